"""Run every program of this folder against a server, and say which of them are content.

python tests/clients/run.py http://127.0.0.1:8000/v1 [--python PYTHON]
"""

import argparse
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("url")
parser.add_argument("--python", default=sys.executable, help="of the environment that has the packages")
arguments = parser.parse_args()
failed = 0
for program in sorted(Path(__file__).parent.glob("with_*")):
    runner = "node" if program.suffix == ".mjs" else arguments.python
    done = subprocess.run([runner, str(program), arguments.url], capture_output=True, text=True, timeout=300)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing was said").splitlines()[-1]
    print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} {program.name}: {last}", flush=True)
    failed += done.returncode != 0
sys.exit(1 if failed else 0)
