"""The layouts of public data sets, in small logs made by hand with the quirks of the published files; no line is theirs."""

import csv
import io
from pathlib import Path

import pytest

from ctrsink.config.data import SourceSpec
from ctrsink.errors import InputError
from ctrsink.prepare.sources import open_source
from tests.data_fixtures import MOVIES, make_events
from tests.whole_log import WholeLog, read_source

EVENTS = [(user, item, rating - 0.5, time) for user, item, rating, time in make_events()]


def spec(kind: str, path: Path) -> SourceSpec:
    return SourceSpec.model_validate({"kind": kind, "path": str(path)})


def read(kind: str, path: Path, block_bytes: int = 1 << 25, on_bad_row: str = "fail") -> WholeLog:
    return read_source(spec(kind, path), "skip" if on_bad_row == "skip" else "fail", block_bytes)


def rows(log: WholeLog, *names: str) -> list[tuple[object, ...]]:
    return [tuple(row[name] for name in names) for row in log.events.to_pylist()]


# --- MovieLens ---


def write_10m(folder: Path) -> Path:
    """The layout of ml-10m.zip: as 1M, but in UTF-8 and with half stars."""
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in EVENTS))
    titles = [f"{m.title} ({m.year}){m.behind}" if m.year else m.title for m in MOVIES]
    lines = [f"{m.id}::{title}::{'|'.join(m.genres)}\n" for m, title in zip(MOVIES, titles, strict=True)]
    (folder / "movies.dat").write_text("".join(lines), "utf-8")
    return folder


def write_csv(folder: Path) -> Path:
    """The layout of ml-latest-small.zip, ml-20m.zip, ml-25m.zip and ml-32m.zip."""
    folder.mkdir()
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\r\n" + "".join(f"{u},{i},{r:.1f},{t}\r\n" for u, i, r, t in EVENTS), newline=""
    )
    text = io.StringIO(newline="")
    movies = csv.writer(text)
    movies.writerow(["movieId", "title", "genres"])
    for m in MOVIES:
        genres = "(no genres listed)" if m.genres == ("unknown",) else "|".join(m.genres)
        movies.writerow([m.id, f"{m.title} ({m.year}){m.behind}" if m.year else m.title, genres])
    movies.writerows([[8, "Long Running, The  (1971-1973) ", "Drama"], [9, "Still On (2009\u2013 )", "Comedy"]])
    (folder / "movies.csv").write_text(text.getvalue(), "utf-8", newline="")
    return folder


@pytest.mark.parametrize("write", [write_10m, write_csv])
def test_newer_movielens_layouts_give_the_fields_of_the_older(tmp_path: Path, write) -> None:
    folder = write(tmp_path / "ml")
    for block_bytes in (100, 1 << 25):
        log = read("movielens", folder, block_bytes)
        assert rows(log, "user", "item", "feedback", "timestamp") == [(str(u), str(i), r, t) for u, i, r, t in EVENTS]
    assert log.items is not None
    assert log.items.to_pylist()[: len(MOVIES)] == [
        {"item": str(m.id), "title": m.title, "year": m.year, "genres": " ".join(m.genres).lower()} for m in MOVIES
    ]
    more = [(row["title"], row["year"]) for row in log.items.to_pylist()[len(MOVIES) :]]
    assert more == ([] if write is write_10m else [("Long Running, The", "1971"), ("Still On", "2009")])


def test_movielens_names_the_line_of_a_bad_row_in_any_block(tmp_path: Path) -> None:
    folder = write_csv(tmp_path / "ml")
    with (folder / "ratings.csv").open("a") as file:
        file.write("1,1,4.0\n1,1,good,5\n")
    with pytest.raises(InputError, match=rf"row {len(EVENTS) + 1} \(line {len(EVENTS) + 2}\): 3 columns instead of 4"):
        read("movielens", folder, 100)
    assert read("movielens", folder, 100, "skip").skipped_rows == 2


def test_another_file_of_that_name_is_no_movielens(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("user,film,stars\n1,2,3\n")
    with pytest.raises(InputError, match=r"ratings.csv is no file of MovieLens: its first line is not 'userId,movieId"):
        open_source(spec("movielens", tmp_path)).blocks(1)


# --- KuaiRec ---

MATRIX = """user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio
14,3,4381,6067,2020-07-05 05:27:48.378,20200705,1593898068.378,0.7221
14,0,20000,5000,2020-07-05 05:28:00.057,20200705,1593898080.057,4.0
15,1,0,8000,,,,0.0
15,12,900,9000,2020-07-06 01:00:00.0,20200706,1593968400.0,0.1
15,4,900,9000,2020-07-06 01:00:09.0,20200706,1593968409.0,0.1
"""
# Line breaks in a caption with and without quotes, quotes in a caption, an open quote, a row cut short.
CAPTIONS = """video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,\
second_level_category_id,second_level_category_name,third_level_category_id,third_level_category_name
0,UNKNOWN,晚饭后 散步！,[],9,喜剧,727,搞笑互动,-124,UNKNOWN
1,今天的菜,"一行,
二行","[美食,家常菜]",5,美食,737,家常,2596,炒菜
3,UNKNOWN,换行\r
没有引号,[],8,颜值,-124,UNKNOWN,-124,UNKNOWN
4,UNKNOWN,"好看,[],26,摄影,-124,UNKNOWN,-124,UNKNOWN
7,UNKNOWN,短
"""
TAGS = 'video_id,feat\n0,[9]\n1,"[5, 8]"\n3,[8]\n4,[26]\n7,[1]\n12,"[27, 9]"\n'


def write_kuairec(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    files = {"big_matrix.csv": MATRIX, "kuairec_caption_category.csv": CAPTIONS, "item_categories.csv": TAGS}
    for name in names or files:
        (folder / name).write_text(files[name], "utf-8", newline="")
    return folder


def test_kuairec_is_read_with_what_is_known_of_each_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_kuairec(tmp_path)
    for block_bytes in (1, 1 << 25):
        log = read("kuairec", folder, block_bytes)
        assert rows(log, "user", "item", "timestamp") == [
            ("14", "3", 1593898068),
            ("14", "0", 1593898080),
            ("15", "12", 1593968400),
            ("15", "4", 1593968409),
        ]
    assert log.events.column("feedback").to_pylist() == pytest.approx([0.7221, 4.0, 0.1, 0.1])
    assert "big_matrix.csv: left out 1 rows without a time" in caplog.text
    assert "kuairec_caption_category.csv: 1 rows are broken; their videos have no caption" in caplog.text
    assert log.items is not None
    assert [tuple(row.values()) for row in log.items.to_pylist()] == [
        # item, caption, cover, topics, category, tags
        ("0", "晚饭后 散步！", "", "", "喜剧/搞笑互动", "9"),
        ("1", "一行, 二行", "今天的菜", "美食 家常菜", "美食/家常/炒菜", "5 8"),
        ("3", "换行 没有引号", "", "", "颜值", "8"),
        ("4", '"好看', "", "", "摄影", "26"),
        ("7", "", "", "", "", "1"),
        ("12", "", "", "", "", "27 9"),
    ]


def test_kuairec_matrix_by_its_name(tmp_path: Path) -> None:
    write_kuairec(tmp_path)
    (tmp_path / "big_matrix.csv").rename(tmp_path / "small_matrix.csv")
    assert read("kuairec", tmp_path / "small_matrix.csv").events.num_rows == 4
    with pytest.raises(InputError, match=r"big_matrix.csv does not exist"):
        read("kuairec", tmp_path)


def test_kuairec_names_a_file_that_is_not_its(tmp_path: Path) -> None:
    matrix = write_kuairec(tmp_path) / "big_matrix.csv"
    (tmp_path / "item_categories.csv").write_text("video_id,feat\n1,comedy\n")
    with pytest.raises(InputError, match=r"item_categories.csv: video '1' has the categories 'comedy'"):
        open_source(spec("kuairec", tmp_path)).items()
    matrix.write_text("user_id,video_id\n1,2\n")
    with pytest.raises(InputError, match=r"big_matrix.csv has no column 'timestamp'; it has user_id, video_id"):
        open_source(spec("kuairec", tmp_path)).blocks(1)
    for name in ("item_categories.csv", "kuairec_caption_category.csv"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"holds neither kuairec_caption_category.csv nor item_categories.csv"):
        open_source(spec("kuairec", tmp_path)).items()


# --- MIND ---

NEWS = """N1\tsports\tgolf\tThe "long" putt\tWho won, and how\thttps://example.org/1\t[]\t[]
N2\tnews\tnewsus\tRain on Monday\t\thttps://example.org/2\t[{"Label": "a ""b"" c"}]\t[]
N3\tfoodanddrink\trecipes\t"Unbalanced\tSoup\thttps://example.org/3\t[]\t[]
"""
TRAIN = """1\tU1\t11/15/2019 8:55:22 AM\tN1 N2\tN3-1 N2-0
2\tU2\t11/14/2019 12:00:00 PM\t\tN1-0
3\tU1\t11/9/2019 12:00:01 AM\tN2 N1 N1\tN1-0 N2-0 N3-1
"""
DEV = "1\tU1\t11/16/2019 1:00:00 PM\tN1 N3\tN4-0\n2\tU3\t11/16/2019 1:00:00 PM\tN4\tN1-1\n"
FIRST = 1573257601  # 2019-11-09 00:00:01 UTC


def write_mind(folder: Path, behaviors: str = TRAIN, news: str = NEWS) -> Path:
    folder.mkdir(parents=True)
    (folder / "behaviors.tsv").write_text(behaviors)
    (folder / "news.tsv").write_text(news)
    return folder


@pytest.mark.parametrize("block_bytes", [1, 60, 1 << 25])
def test_mind_gives_each_shown_news_and_each_history_once(tmp_path: Path, block_bytes: int) -> None:
    log = read("mind", write_mind(tmp_path / "MINDsmall_train"), block_bytes)
    assert rows(log, "user", "item", "timestamp", "feedback", "label", "request") == [
        ("U1", "N3", 1573808122, 1, 1, "1"),
        ("U1", "N2", 1573808122, 0, 0, "1"),
        ("U2", "N1", 1573732800, 0, 0, "2"),
        ("U1", "N2", FIRST - 3, 1, None, None),
        ("U1", "N1", FIRST - 2, 1, None, None),
        ("U1", "N1", FIRST - 1, 1, None, None),
        ("U1", "N1", FIRST, 0, 0, "3"),
        ("U1", "N2", FIRST, 0, 0, "3"),
        ("U1", "N3", FIRST, 1, 1, "3"),
    ]
    assert log.items is not None
    assert [tuple(row.values()) for row in log.items.to_pylist()] == [
        ("N1", "sports", "golf", 'The "long" putt', "Who won, and how"),
        ("N2", "news", "newsus", "Rain on Monday", ""),
        ("N3", "foodanddrink", "recipes", '"Unbalanced', "Soup"),
    ]


def test_mind_folders_share_users_and_news_but_no_request(tmp_path: Path) -> None:
    write_mind(tmp_path / "mind" / "MINDsmall_train")
    write_mind(tmp_path / "mind" / "MINDsmall_dev", DEV, NEWS.replace("N2", "N4"))
    log = read("mind", tmp_path / "mind", 60)
    assert log.items is not None
    assert log.items.column("item").to_pylist() == ["N1", "N4", "N3", "N2"]
    found = rows(log, "user", "item", "label", "request")
    assert found[:3] == [
        ("U1", "N4", 0, "MINDsmall_dev-1"),
        ("U3", "N4", None, None),
        ("U3", "N1", 1, "MINDsmall_dev-2"),
    ]
    assert [item for user, item, label, _ in found if user == "U1" and label is None] == ["N2", "N1", "N1"]
    requests = {request for *_, request in found if request}
    assert requests == {"MINDsmall_dev-1", "MINDsmall_dev-2", *(f"MINDsmall_train-{n}" for n in (1, 2, 3))}


@pytest.mark.parametrize(
    ("line", "message", "left"),
    [
        ("4\tU9\t11/15/2019\t\tN1-0\n", r"row 4 \(line 4\): column time: '11/15/2019' is no time like 11/15/2019 8:55:22 AM", 0),
        (
            "4\tU9\t11/15/2019 8:55:22 AM\t\tN1 N2\n",
            r"row 4 .*: column impressions: 'N1 N2' does not say which news were click",
            0,
        ),
        ("4\tU9\t11/15/2019 8:55:22 AM\t\t\n", r"row 4 .*: column impressions: '' does not say which news were clicked", 0),
        ("4\t\t11/15/2019 8:55:22 AM\t\tN1-0\n", r"row 4 .*: column user: a value is missing", 0),
        ("4\tU9\t11/15/2019 8:55:22 AM\tN1-0\n", r"row 4 \(line 4\): 4 columns instead of 5", 0),
        ("4\tU9\t11/15/2019 8:55:22 AM\tN1\tN9-1 N1-0\n", r"row 4 .*, column item: 'N9' is not in the item table", 2),
    ],
)
def test_mind_names_or_skips_a_bad_row(tmp_path: Path, line: str, message: str, left: int) -> None:
    folder = write_mind(tmp_path / "train", TRAIN + line)
    with pytest.raises(InputError, match="behaviors.tsv, " + message):
        read("mind", folder)
    skipping = read("mind", folder, on_bad_row="skip")
    assert skipping.events.num_rows == 9 + left
    assert skipping.skipped_rows == 1


def test_mind_needs_its_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no behaviors.tsv, nor does a folder in it: unpack MIND there"):
        open_source(spec("mind", tmp_path)).blocks(1)
    (write_mind(tmp_path / "train") / "news.tsv").unlink()
    with pytest.raises(InputError, match=r"news.tsv does not exist"):
        open_source(spec("mind", tmp_path)).items()
