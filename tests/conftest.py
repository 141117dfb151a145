"""One thread a process: tests are small, run side by side, and compare bits."""

import os
import signal

# before torch is imported, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

# in the background of a script Ctrl-C is ignored, and would be by the processes that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
