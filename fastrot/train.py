"""deepspeed fastrot/train.py --config configs/in1k.yaml data.train=/path data.val=/path"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A launcher puts this file's folder first on the path; what must be there is the repository
    # (and the kernels beside it, where they are not installed).
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))
    from fastrot.cli import entry

    entry(["train", *sys.argv[1:]])
