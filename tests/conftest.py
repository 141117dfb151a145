"""One thread a process: tests are small, run side by side, and compare bits."""

import os

# before torch is imported, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
