"""The start of `mlip` and of `python -m mlip_cli`, which torchrun uses."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C while it loads ends the process without a traceback."""
    # batches of changing shapes leave gaps in a GPU's memory, which these segments close
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    is_listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup
    if is_listening:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mlip_cli import cli
    from mlip_cli.terminal import endings, output

    output.open_streams()
    if is_listening:
        signal.signal(signal.SIGINT, endings.interrupt)
    cli.main()


if __name__ == "__main__":
    main()
