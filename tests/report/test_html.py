"""The HTML report: well formed, self-contained, everything in it, and nothing taken for markup."""

from html.parser import HTMLParser

from layerwise.plan import Plan, Prune
from layerwise.report import html_report
from layerwise.structure.parts import Layer

LAYERS = [
    Layer(f"model.layers.{i}.{role}", "", "linear", role, (8, 4), 1, 8, 4, block=f"model.layers.{i}")
    for i in (0, 1)
    for role in ("q", "up")
]
ROWS = [
    {"method": "dense", "sparsity": 0.0, "perplexity": 12.3456, "tokens": 20480},
    {"method": "uniform", "sparsity": 0.6, "perplexity": 123456.7},
    {"method": "random", "sparsity": 0.6, "perplexity": float("inf")},
    {"method": "owl <b>", "sparsity": 0.6, "perplexity": 30.5},
]


class Page(HTMLParser):
    """Checks that every tag is closed in order, and gathers attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.count: dict[str, int] = {}
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(**changes: object) -> tuple[str, Page]:
    plan = Plan(layers={layer.name: Prune(sparsity=0.5 if layer.role == "q" else 0.25) for layer in LAYERS})
    given = {
        "title": "demo & more",
        "protocol": {"text": "python-docs", "length": 512, "calibration": "0123abcd"},
        "rows": ROWS,
        "plans": {"owl <b>": plan, "none": Plan(layers={})},
        "layers": LAYERS,
        "outcome": ["Zeros do not shrink this format."],
        "best": "owl <b>",
    }
    text = html_report(**(given | changes))
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    return text, parsed


def test_everything_is_in_it():
    _, parsed = page()
    for part in (
        "demo & more",
        "python-docs",
        "512",
        "0123abcd",
        "12.35",
        "123,457",
        "20,480",
        "owl <b>",
        "Zeros do not shrink",
    ):
        assert part in parsed.text, part
    assert "owl <b>: 37.50% of the weights it prunes are zero" in parsed.text
    assert "none: leaves all of these layers as they are" in parsed.text
    assert ("class", "best") in parsed.attributes
    assert parsed.count["rect"] == len(LAYERS)
    assert "b" not in parsed.count


def test_bars_are_as_high_as_the_sparsity():
    text, _ = page()
    assert 'y="50.0" width=".85" height="50.0"' in text
    assert "model.layers.0.q: 50.00% unstructured" in text
    assert 'y="75.0" width=".85" height="25.0"' in text


def test_nothing_is_fetched_from_elsewhere():
    text, parsed = page()
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.count)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in parsed.attributes}
    assert "http" not in text
    assert "url(" not in text


def test_without_plans_or_rows_it_still_stands():
    _, parsed = page(plans={}, rows=[], outcome=[], best=None)
    assert "svg" not in parsed.count


def test_it_stays_small():
    layers = [
        Layer(f"model.layers.{i}.q", "", "linear", "q", (8, 4), 1, 8, 4, block=f"model.layers.{i}") for i in range(560)
    ]
    plan = Plan(layers={layer.name: Prune(sparsity=0.5) for layer in layers})
    assert len(page(plans={"owl": plan}, layers=layers)[0]) < 200_000
