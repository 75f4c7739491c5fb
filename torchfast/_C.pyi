from typing import TypedDict, type_check_only

@type_check_only
class BuildInfo(TypedDict):
    compiler: str
    built_with_torch: str
    cuda_archs: str
    simd: str

def build_info() -> BuildInfo: ...
def has_symbol(library: str, symbol: str) -> bool: ...
