import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cuda_emulator

sys.exit(cuda_emulator.pytest(sys.argv[1:]))
