from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    built_with_torch: str
    cuda_archs: str
    simd: str

def build_info() -> BuildInfo: ...
def cuda_probe(device: int = 0) -> int: ...
def has_symbol(library: str, symbol: str) -> bool: ...
