"""The error of a download."""

from mlip_cli.data.pictures import RejectedPictureError


class DownloadError(RejectedPictureError):
    """A download that gave no picture. `detail` says what was seen, without the address."""

    def __init__(self, reason: str, detail: str, *, is_retried: bool = False) -> None:
        super().__init__(reason, detail)
        self.is_retried = is_retried
