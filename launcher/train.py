"""The entry point of every launcher: deepspeed, accelerate launch, torchrun, srun or plain python.

deepspeed launcher/train.py --config zero3_sft_ma.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_ds.cli import train

if __name__ == "__main__":
    sys.exit(train())
