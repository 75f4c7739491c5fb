from typing import TypedDict, type_check_only

@type_check_only
class BuildInfo(TypedDict):
    compiler: str
    built_with_torch: str
    cuda_archs: str
    simd: str

def build_info() -> BuildInfo: ...

# In builds with CUDA code:
def cuda_probe(device: int = 0) -> int: ...
def has_symbol(library: str, symbol: str) -> bool: ...
