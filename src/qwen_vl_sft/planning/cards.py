"""The GPUs that a plan knows: memory, rates of products and of memory, and the link to the next GPU."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qwen_vl_sft.errors import UserError, quoted

# What the driver and CUDA's context take of a card's memory.
CONTEXT = 0.75 * 2**30


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: how people write it; the names of devices hold it too.
        memory: bytes, as its driver tells.
        flops: dense FLOP/s of half-precision products added up in float32, without sparsity.
        bandwidth: bytes/s of its memory.
        link: bytes/s in one direction to another GPU of the same machine.
        bfloat16: computes bfloat16 in hardware.
        fp8: multiplies FP8 (e4m3) at twice the rate of half precision: Ada, Hopper, Blackwell.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float = 25e9
    bfloat16: bool = True
    fp8: bool = True

    @property
    def room(self) -> float:
        """Return the bytes that a process can get."""
        return self.memory - CONTEXT


def _card(
    name: str, mib: int, tflops: float, gbs: float, link: float = 25, bfloat16: bool = True, fp8: bool = True
) -> Card:
    return Card(name, mib * 2**20, tflops * 1e12, gbs * 1e9, link * 1e9, bfloat16, fp8)


# Memory in MiB as nvidia-smi and rocm-smi show it; dense TFLOP/s and GB/s from the makers' datasheets; the link in GB/s
# each way: NVLink or Infinity Fabric where there is one, else what PCIe gives in practice.
CARDS: dict[str, Card] = {
    # https://www.nvidia.com/en-us/data-center/tesla-t4/ (FP16; no bfloat16)
    "t4": _card("T4", 15360, 65, 300, 12, bfloat16=False, fp8=False),
    # https://www.nvidia.com/en-us/data-center/l4/ (242 with sparsity)
    "l4": _card("L4", 23034, 121, 300),
    # https://www.nvidia.com/en-us/data-center/l40s/
    "l40s": _card("L40S", 46068, 362, 864),
    # https://www.nvidia.com/en-us/data-center/products/a10-gpu/
    "a10": _card("A10", 23028, 125, 600, fp8=False),
    # GeForce: FP16 added up in FP32, of NVIDIA's whitepapers on Ampere (GA102), Ada and Blackwell (RTX).
    "rtx3090": _card("RTX 3090", 24576, 71, 936, fp8=False),
    "rtx4090": _card("RTX 4090", 24564, 165, 1008),
    "rtx5090": _card("RTX 5090", 32607, 209, 1792, 50),
    "a10g": _card("A10G", 23028, 70, 600, fp8=False),
    "a40": _card("A40", 46068, 150, 696, fp8=False),
    "l40": _card("L40", 46068, 181, 864),
    "rtx6000ada": _card("RTX 6000 Ada", 49140, 364, 960),
    # https://www.nvidia.com/en-us/data-center/a100/ (SXM)
    "a100-40": _card("A100 40 GB", 40960, 312, 1555, 300, fp8=False),
    "a100-80": _card("A100 80 GB", 81920, 312, 2039, 300, fp8=False),
    # https://www.nvidia.com/en-us/data-center/h100/ (SXM; 1,979 with sparsity)
    "a800": _card("A800", 81920, 312, 2039, 200, fp8=False),
    "h100": _card("H100", 81559, 989, 3350, 450),
    "h100-pcie": _card("H100 PCIe", 81559, 756, 2000, 300),
    "gh200": _card("GH200", 97871, 989, 4000, 450),
    # https://www.nvidia.com/en-us/data-center/h200/
    "h200": _card("H200", 143771, 989, 4800, 450),
    # https://www.nvidia.com/en-us/data-center/dgx-b200/ and gb200-nvl72, a GPU of it
    "b200": _card("B200", 183359, 2250, 8000, 900),
    "gb200": _card("GB200", 189471, 2500, 8000, 900),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    "mi300x": _card("MI300X", 196592, 1307, 5300, 448, fp8=False),
}
_ALSO = {"3090": "rtx3090", "4090": "rtx4090", "5090": "rtx5090", "a100": "a100-80", "a100-40gb": "a100-40"}
_ALSO |= {"a100-80gb": "a100-80", "h100-80": "h100", "h100-sxm": "h100"}


def find_card(text: str) -> Card:
    """Return the GPU of a name such as h200, "RTX 4090" or 48GB:181TFLOPS (memory and dense half-precision rate).

    Raises `UserError` for another one.
    """
    given = re.fullmatch(r"(\d+(?:\.\d+)?)\s*Gi?B?\s*[:,/]\s*(\d+(?:\.\d+)?)\s*(?:TFLOPS?(?:/s)?)?", text.strip(), re.I)
    if given:
        memory, tflops = float(given[1]), float(given[2])
        if memory and memory * 2**30 <= CONTEXT:
            raise UserError(f"--gpu: {quoted(text)} has less memory than CUDA takes; name a larger GPU")
        if memory and tflops:
            # The rate of its memory is not given: that of an H200 in proportion to its products.
            return Card(f"{memory:g} GiB, {tflops:g} TFLOP/s", memory * 2**30, tflops * 1e12, tflops * 4.85e9)
    name = re.sub(r"[\s_]+|nvidia|geforce|tesla", "", text.lower()).removeprefix("-")
    name = _ALSO.get(name, name)
    if name in CARDS:
        return CARDS[name]
    near = difflib.get_close_matches(name, CARDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"--gpu: {quoted(text)} is unknown; {hint}known are {', '.join(CARDS)}; for another write its memory and dense"
        " bf16 rate, e.g. 48GB:181TFLOPS"
    )


def card_of_device(device_name: str, memory: float = 80 * 2**30) -> Card | None:
    """Return the GPU that a driver calls `device_name`, such as "NVIDIA H100 80GB HBM3"; None where it is not known.

    `memory`, in bytes, tells an A100 of 40 GB from one of 80.
    """
    for card in sorted(CARDS.values(), key=lambda card: len(card.name), reverse=True):
        words = card.name.removesuffix(" 40 GB").removesuffix(" 80 GB")
        if re.search(rf"\b{words}\b", device_name) and (words == card.name or abs(card.memory - memory) < 20 * 2**30):
            return card
    return None
