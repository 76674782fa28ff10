"""The page: read as a parser reads it, and as a browser does."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO

import pytest
from matplotlib.image import imread

from ase_bptt.evaluation import BASIN_RULE, Evaluation, Row
from ase_bptt.evaluation.compare import compare
from ase_bptt.report.page import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def evaluation(factor: float) -> Evaluation:
    return Evaluation(tuple(
        Row(
            id=f"runs/<b>{k}</b> & \"x\"", group=f"kind <{k // 2}>", unrelaxed=factor * (k + 2),
            delta_q=factor * (k + 1), rmsd=0.1, max_displacement=0.2, right_basin=k != 2, reference_moves=0.0,
            residual_force=0.3, space_group="P1 (1)" if k == 1 else "Fd-3m (227)",
            reference_space_group="Fd-3m (227)", status="out of steps" if k == 3 else "converged", nsteps=7,
            displacements=(0.1, 0.2),
        )
        for k in range(4)
    ))  # fmt: skip


BEFORE, AFTER = evaluation(2.0), evaluation(1.0)
HISTORY = [
    {"epoch": k + 1, "train_loss": 2.0 - k, "valid_score": 1.0, "valid_delta_q": 3.0 - k, "gradient_norm": 1.0}
    for k in range(2)
]
FACTS = (("potential", "mace <small>"), ("command", "ase-bptt train a & b"))
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its text; fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.elements, self._open = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **{k: v or "" for k, v in attributes}}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [element for element in self.elements if element["tag"] == tag]

    def texts(self, tag: str) -> list[str]:
        return [" ".join(element["text"].split()) for element in self.all(tag)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, title="Defects <1> & more", evaluation=BEFORE, after=AFTER, comparison=compare(BEFORE, AFTER),
               history=HISTORY, facts=FACTS)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, title="One", evaluation=BEFORE)
    return path


class TestBoth:
    @pytest.fixture
    def page(self, both):
        return Page(both)

    def test_it_begins_with_the_result_in_a_sentence(self, page):
        assert page.texts("title") == page.texts("h1") == ["Defects <1> & more"]
        assert page.texts("p")[0] == (
            "Mean Delta-Q to the reference over 4 structures, in amu1/2 Å: 5.00 (before), 2.50 (after), 50 % lower. "
            "In the right basin: 3 of 4 (before), 3 of 4 (after)."
        )

    def test_its_sections(self, page):
        assert page.texts("h2") == [
            "How it was made", "Summary", "Is it more than chance?", "By group", "Each structure", "Training",
            "How to read this page",
        ]  # fmt: skip

    def test_every_table_has_a_caption_and_heads_of_its_rows(self, page):
        assert len(page.all("table")) == len(page.texts("caption")) == 4
        assert all(page.texts("caption"))
        assert {head["scope"] for head in page.all("th")} == {"row", "col", "colgroup"}
        # 2 facts, 7 measures, 2 groups, 4 structures.
        assert [head["scope"] for head in page.all("th")].count("row") == 15

    def test_all_rows_of_a_table_are_as_wide_as_its_heads(self, page):
        for table in page.source.split("<table")[1:]:
            head, body = table.split("<tbody>")
            wide = {len(re.findall(r"<t[hd][ >]", line)) for line in body.split("<tr>")[1:]}
            assert len(wide) == 1
            if "<thead>" in head:
                (width,) = wide
                first = head.split("<tr>")[1]
                spans = [int(n) for n in re.findall(r'colspan="(\d+)"', first)]
                assert len(re.findall(r"<th[ >]", first)) - len(spans) + sum(spans) == width

    def test_names_are_text_and_not_markup(self, page):
        assert not page.all("b")
        rows = [head["text"] for head in page.all("th") if head["scope"] == "row"]
        assert '<b>0</b> & "x" kind <0>' in [" ".join(text.split()) for text in rows]
        assert "mace <small>" in page.texts("td")
        assert "ase-bptt train a & b" in page.texts("td")

    def test_numbers_stand_on_the_right_and_wrong_ones_are_described_in_words(self, page):
        cells = dict(zip(page.texts("td"), page.all("td"), strict=True))
        assert cells["0.100"]["class"] == "number"
        assert cells["no"]["class"] == "wrong"
        assert cells["lost: P1"]["class"] == "wrong"
        assert "wrong" in cells["7 out of steps"]["class"]
        assert "class" not in cells["kept"]

    def test_the_change_of_each_measure_is_reported(self, page):
        texts = page.texts("td")
        at = texts.index("5.00")
        assert texts[at : at + 3] == ["5.00", "2.50", "50 % lower"]

    def test_the_comparison_is_in_words(self, page):
        assert any(text.startswith("Mean Delta-Q: 50 % lower (95 % interval") for text in page.texts("li"))
        assert any("with so few groups" in text for text in page.texts("li"))

    def test_every_picture_is_in_the_page_and_says_what_it_shows(self, page):
        pictures = page.all("img")
        assert len(pictures) == len(page.all("figcaption")) == 4
        assert all(len(text) > 60 for text in page.texts("figcaption"))
        for picture in pictures:
            kind, data = picture["src"].split(",")
            pixels = imread(BytesIO(base64.b64decode(data, validate=True)), format="png")
            height, width = pixels.shape[:2]
            assert kind == "data:image/png;base64"
            assert pixels[..., :3].std() > 0.01
            assert width / height == pytest.approx(int(picture["width"]) / int(picture["height"]), rel=0.01)
            assert len(picture["alt"]) > 40
        assert "4 of 4 points below the diagonal" in pictures[0]["alt"]

    def test_it_needs_no_other_file_and_no_script(self, page):
        assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("a")
        without_data = re.sub(r"base64,[^\"]*", "", page.source)
        assert not re.search(r"https?:|//\w|@import|url\(|@font-face", without_data)

    def test_units_and_rules_are_explained(self, page):
        said = " ".join(page.texts("dd"))
        assert BASIN_RULE.removeprefix("right basin: ")[1:] in said
        assert "amu1/2 Å" in said
        assert page.all("html")[0]["lang"] == "en"
        assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))


def test_of_one_evaluation_there_is_nothing_to_compare(one):
    page = Page(one)
    assert page.texts("h2") == ["Summary", "By group", "Each structure", "How to read this page"]
    assert page.texts("p")[0] == (
        "After relaxation 4 structures lie at a mean Delta-Q of 5.00 amu1/2 Å from the reference (unrelaxed: 7.00). "
        "3 of 4 are in the right basin."
    )
    assert len(page.all("img")) == 2
    assert "before" not in page.texts("th")


def test_labels_name_the_columns(tmp_path):
    write_page(tmp_path / "a.html", title="a", evaluation=BEFORE, after=AFTER, labels=("CHGNet", "MACE"))
    heads = Page(tmp_path / "a.html").texts("th")
    # Summary 1, groups 2, structures 7.
    assert heads.count("CHGNet") == heads.count("MACE") == 10
    assert "before" not in heads


def test_structures_that_diverged_have_a_page_too(tmp_path):
    lost = [{**row, "delta_q": float("nan"), "right_basin": False, "status": "diverged", "space_group": ""}
            for row in AFTER.todict()["rows"]]  # fmt: skip
    after = Evaluation.from_rows(lost)
    write_page(tmp_path / "a.html", title="a", evaluation=BEFORE, after=after, comparison=compare(BEFORE, after))
    page = Page(tmp_path / "a.html")
    assert "not finite (after)" in page.texts("p")[0]
    assert not any("nan" in text for text in page.texts("td") + page.texts("li"))


@pytest.mark.parametrize(
    ("best", "said"), [(None, "unless the weights before"), (2, "was chosen."), (0, "No epoch was better")]
)
def test_which_weights_were_kept_is_reported(tmp_path, best, said):
    write_page(tmp_path / "a.html", title="a", evaluation=BEFORE, history=HISTORY, best_epoch=best)
    assert said in Page(tmp_path / "a.html").texts("figcaption")[-1]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "a.html").write_text("old")
    other = Evaluation(BEFORE.rows[:2])
    with pytest.raises(ValueError, match="same structures"):
        write_page(tmp_path / "a.html", title="a", evaluation=BEFORE, after=other)
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert (tmp_path / "a.html").read_text() == "old"


MEASURE = """<script>
addEventListener("load", () => {
  const all = (what) => [...document.querySelectorAll(what)];
  document.title = [
    all("table").length, all("tbody tr").length, all("img").filter((i) => i.naturalWidth > 0).length,
    document.documentElement.scrollWidth > innerWidth ? "wider" : "fits",
  ].join(" ");
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("width", [500, 1100])
def test_a_browser_shows_all_of_it(both, tmp_path, width):
    copy = tmp_path / "copy.html"
    copy.write_text(both.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} "
        f"--window-size={width},900 --virtual-time-budget=3000 --dump-dom"
    )
    command = [BROWSER, *options.split(), copy.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"<title>(.*?)</title>", shown)[1] == "4 15 4 fits"
