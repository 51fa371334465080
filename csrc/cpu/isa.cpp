#include "cpu/isa.h"

#include <atomic>

namespace llava_cot {
namespace {

std::atomic<const Loops*> chosen{nullptr};

}  // namespace

std::vector<const Loops*> available_loops() {
  std::vector<const Loops*> tables;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&AVX512_BF16_LOOPS);
  if (avx512) tables.push_back(&AVX512_LOOPS);
  if (avx2) tables.push_back(&AVX2_LOOPS);
#endif
  tables.push_back(&BASELINE_LOOPS);
  return tables;
}

const Loops& loops() {
  const Loops* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = available_loops().front(), std::memory_order_relaxed);
  return *table;
}

bool use_loops(std::string_view name) {
  for (const Loops* table : available_loops()) {
    if (name == table->name) {
      chosen.store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace llava_cot
