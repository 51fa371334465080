"""Published files that are known by their md5: VLMEvalKit's, from its ``DATASET_MD5`` at e8e78f05 (August 2026).

The second MMBench_TEST_EN_V11 is the file of before June 2026, at 9f21ee8a (November 2024).
"""

from typing import NamedTuple


class KnownFile(NamedTuple):
    """The published name of a file and the benchmark that reads it, if one does."""

    name: str
    benchmark: str | None


KNOWN_FILES = {
    "e1ecd2140806c1b1bbf54b43372efb9e": KnownFile("MMStar", "mmstar"),
    "b6caf1133a01c6bb705cf753bb527ed8": KnownFile("MMBench_DEV_EN", "mmbench"),
    "6939fadb0ce626fefc0bdc9c64efc528": KnownFile("MMBench_TEST_EN", "mmbench"),
    "30c05be8f2f347a50be25aa067248184": KnownFile("MMBench_DEV_EN_V11", "mmbench"),
    "8d1a704e791df6f5d9fb3ef782b65365": KnownFile("MMBench_TEST_EN_V11", "mmbench"),
    "26f0f15381a21720255091d3e0316ce6": KnownFile("MMBench_TEST_EN_V11", "mmbench"),
    "08b8fc3324a5ed74155350f57be69fbd": KnownFile("MMBench_DEV_CN", None),
    "7e1239baf0ee4c8b513e19705a0f317e": KnownFile("MMBench_TEST_CN", None),
    "593f9b5f6bea453d870a798b34ae4f37": KnownFile("MMBench_DEV_CN_V11", None),
    "156e6569f9547afb16603eca16e85373": KnownFile("MMBench_TEST_CN_V11", None),
    "748aa6d4aa9d4de798306a63718455e3": KnownFile("MMVet", "mmvet"),
    "f199b98e178e5a2a20e7048f5dcb0464": KnownFile("MathVista_MINI", "mathvista"),
    "0f593e0d1c7df9a3d69bf1f947e71975": KnownFile("AI2D_TEST", "ai2d"),
    "fd8f463634d4fe9fbd23b876e8eea5be": KnownFile("AI2D_TEST_NO_MASK", "ai2d_unmasked"),
    "0c23ac0dc9ef46832d7a24504f2a0c7c": KnownFile("HallusionBench", "hallusionbench"),
}
