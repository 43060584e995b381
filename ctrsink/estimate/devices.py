"""GPUs by their data sheets."""

from typing import NamedTuple

# Dense bf16 products with fp32 accumulation, in TFLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


class Device(NamedTuple):
    """What one worker computes on."""

    memory: float
    """Bytes."""
    flops: float | None
    """Per second, dense, in bf16; None: not known."""
    fp32: float | None = None
    """The same in fp32, without TF32."""
    bandwidth: float | None = None
    """Bytes per second between memory and processor."""
    link: float | None = None
    """Bytes per second that it sends to others of its node (NVLink; PCIe where it has none), in one direction."""


GB = 1e9
GPUS = {
    "h100-80gb": Device(80 * GB, PEAK_TFLOPS["H100"] * 1e12, 67e12, 3350 * GB, 450 * GB),
    "h200": Device(141 * GB, PEAK_TFLOPS["H200"] * 1e12, 67e12, 4800 * GB, 450 * GB),
    "a100-80gb": Device(80 * GB, PEAK_TFLOPS["A100"] * 1e12, 19.5e12, 2039 * GB, 300 * GB),
    "l40s": Device(48 * GB, PEAK_TFLOPS["L40S"] * 1e12, 91.6e12, 864 * GB, 32 * GB),
    "b200": Device(180 * GB, PEAK_TFLOPS["B200"] * 1e12, 75e12, 7700 * GB, 900 * GB),
}
"""H100, H200, A100 and B200 in their SXM forms. Figures of NVIDIA's data sheets: memory in 10^9 bytes, links in one direction."""
