"""`mlip search`: the pictures of a collection that are nearest to texts and to pictures."""

from collections.abc import Sequence
from pathlib import Path

from mlip_cli.errors import UsageError, interrupted_as
from mlip_cli.evaluate.wanted import check_rates
from mlip_cli.report.search_page import print_search, search_page
from mlip_cli.report.write import write_page, written_line
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.terminal.output import print_json, say


def search(
    run: str,
    texts: Sequence[str],
    *,
    image_queries: Sequence[Path],
    images: str,
    top: int,
    merge_rate: float | None,
    out: Path | None,
    batch_size: int,
    device: str,
    precision: str | None = None,
    as_json: bool,
) -> None:
    """Print the nearest pictures to each query, and write a page that shows them.

    Raises:
        UsageError: before the pictures are read: no query, no such run, or a merge rate that no plan reaches; no
            pictures.
        RunError: the work failed.
    """
    if not texts and not image_queries:
        raise UsageError("nothing to search for; name a text, as in mlip search RUN 'a red heart', or --image FILE")
    for text in texts:
        if not text.strip():
            raise UsageError("an empty text; write what to search for, as in 'a red heart'")
    if not Path(images).exists() and not any(sign in images for sign in "*?[{"):
        raise UsageError(f"--images {images}: no such file or folder; name pictures to search among")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        why = "is a folder; name a file" if out.is_dir() else f"folder {out.parent} does not exist; make it"
        raise UsageError(f"--out {out}: {why}")
    found, checkpoint = find_checkpoint(run)
    if merge_rate is not None:
        check_rates(found.read_recipe(), [merge_rate])
    with interrupted_as("interrupted; the same command goes on from the vectors that are written"):
        say("loading PyTorch and the weights")
        from mlip_cli.evaluate.encoder import load_encoder
        from mlip_cli.evaluate.search import SearchTerm, read_query
        from mlip_cli.evaluate.search import search as search_pictures
        from mlip_cli.evaluate.search_pictures import open_pictures

        asked = [*(SearchTerm(text, None) for text in texts), *map(read_query, image_queries)]
        pictures = open_pictures(images)
        encoder = load_encoder(str(checkpoint), device=device, merge_rate=merge_rate, precision=precision)
        result, thumbnails = search_pictures(encoder, pictures, asked, images=images, top=top, batch_size=batch_size)
    path = out or encoder.loaded.run.folder / "search.html"
    write_page(path, search_page(result, thumbnails, written=written_line("the model and the pictures")))
    if as_json:
        print_json({**result.to_json(), "page": str(path)})
    else:
        print_search(result)
    say(f"pictures: {path}")
