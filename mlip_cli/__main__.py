"""The start of `mlip` and of `python -m mlip_cli`, which torchrun uses."""

import signal


def main() -> None:
    """Run the command line; Ctrl-C while it loads ends the process without a traceback."""
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
