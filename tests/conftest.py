"""Set before torch is imported: its runtime of threads reads it once."""

import os

# Tests of two threads run beside another stream of tests: a thread that waits leaves its core to others. One that spins
# instead makes them take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
