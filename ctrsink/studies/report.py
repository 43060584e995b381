"""`ctrsink report`: one page of a run or of a study, from what is in its folder."""

from typing import Any

from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.report.page import Note, Page, render
from ctrsink.studies.report_run import is_run, run_page
from ctrsink.studies.report_study import runs_below, study_page


def write_report(folder: str, to: str, split: str | None = None, sequences: int = 64) -> dict[str, Any]:
    """Write the page of the run or study in `folder` into the file `to`; both local or s3://.

    What cannot be told, because the run has not got so far, has no such thing or its files are gone, is said in its place.

    Args:
        split: whose slices are shown, and which a study is compared on; None: the study's own, else test.
        sequences: sample of the look into a run's model; 0: none, and the model is not loaded.

    Returns:
        The `report`, what it is `of`, and what is `missing`: by section, the reasons.

    Raises:
        InputError: the folder holds neither a run nor a study, or the file cannot be written.
    """
    folder = folder.rstrip("/")
    if to.endswith("/"):
        raise InputError(f"{to} is a folder: name the file of the page, for example {to}report.html")
    if is_run(folder):
        page = run_page(folder, split or "test", sequences)
    elif runs := runs_below(folder):
        page = study_page(folder, runs, split)
    else:
        raise InputError(f"{folder} holds neither a run nor a study: give the run_dir of `ctrsink train` or a study's folder")
    storage.write_bytes(to, render(page).encode())
    return {"report": to, "of": f"{page.kind} {page.title}", "missing": _missing(page)}


def _missing(page: Page) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for section in page.sections:
        for part in section.parts:
            if isinstance(part, Note) and part.missing:
                found.setdefault(section.title, []).append(part.text)
    return found
