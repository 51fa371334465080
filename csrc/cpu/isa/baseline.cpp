// The loops for every machine, with the vectors that the compiler's default has: SSE2 on x86-64.
#include "cpu/isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#define VECTOR_BYTES 16
#include "cpu/isa/table.h"

namespace llava_cot {
constinit const Loops BASELINE_LOOPS = table("baseline");
}
