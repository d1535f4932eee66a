"""Every option with its help, one name each. One place, so that a word means the same in all commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

WHAT, HOW, DATA, RUN, OUTPUT = "What to compress", "How", "Data", "Run", "Output"


def _option(panel: str | None, metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option in this panel of the help. Without `show_default` the text says what the default is, or there is none."""
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **{"show_default": False, **more})


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub name such as HuggingFaceTB/SmolLM2-135M, or [bold]demo[/]: the model inside this package.",
        show_default=False,
    ),
]
FirstPlan = Annotated[Path, typer.Argument(metavar="A", help="A plan (YAML or JSON).", show_default=False)]
SecondPlan = Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)]

# what to compress
OtherModel = Annotated[str, _option(WHAT, "MODEL", "Another language model.", "--model", show_default=True)]
Include = Annotated[
    list[str] | None, _option(WHAT, "GLOB", "Only weights whose names match, e.g. '*.mlp.*' (repeatable).")
]
Exclude = Annotated[list[str] | None, _option(WHAT, "GLOB", "Leave out weights whose names match (repeatable).")]

# how: the plan
Method = Annotated[
    str | None,
    _option(
        HOW,
        "NAME",
        "How the budget is shared over the layers: see [bold]layerwise methods[/]."
        "  [dim]default: uniform; uniform-bits with --bits; adapt-pruner with --parameters, --macs or --latency[/]",
    ),
]
Methods = Annotated[str, _option(HOW, "A,B,…", "Methods beside the controls uniform and random.", show_default=True)]
Sparsity = Annotated[
    float | None,
    _option(HOW, "S", "Fraction of the chosen weights set to zero, 0 to 1.  [dim]default: the method's own[/]"),
]
OneSparsity = Annotated[
    float, _option(HOW, "S", "Fraction of the weights set to zero.", "--sparsity", show_default=True)
]
Sparsities = Annotated[str, _option(HOW, "S,T,…", "Budgets.", "--sparsity", show_default=True)]
Pattern = Annotated[
    str | None,
    _option(
        HOW,
        "PATTERN",
        "[bold]unstructured[/], n:m such as 2:4 (2 kept of every 4 inputs), or blocks of outputs x inputs such as block:16x16."
        "  [dim]default: the method's own, mostly unstructured[/]",
    ),
]
Set = Annotated[
    list[str] | None,
    _option(
        HOW,
        "NAME=VALUE",
        "A setting of the method, e.g. spread=0.1 (repeatable). compare gives it to each method that has it.",
        "--set",
    ),
]
For = Annotated[
    str | None,
    _option(
        HOW,
        "ENGINE",
        "What will load the folder of a plan with bits: transformers (which reads all experts of a model alike), or [bold]vllm[/] (which"
        " runs 2, 4 and 8 bits, and q, k, v, gate, up and the experts of a block alike).  [dim]default: transformers[/]",
        "--for",
    ),
]
Bits = Annotated[
    float | None,
    _option(
        HOW,
        "B",
        "Bits per weight on average, scales and zeros counted, e.g. 3.25; of uniform-bits the level; of kvtuner the most bits of a cached"
        " number.  [dim]default: the method's own[/]",
    ),
]
Dense = Annotated[
    bool,
    _option(HOW, None, "With --solver armor: save the factors multiplied out, a stock folder in full size.", "--dense"),
]
Levels = Annotated[
    str | None,
    _option(
        HOW, "A,B,…", "Bits that a layer, or keys and values, can get, e.g. 2,4.  [dim]default: the method's own[/]"
    ),
]
MinSparsity = Annotated[float | None, _option(HOW, "S", "No layer below this.")]
MaxSparsity = Annotated[float | None, _option(HOW, "S", "No layer above this.")]
Minutes = Annotated[
    float | None,
    _option(
        HOW, "M", "With --method auto or kvtuner: try nothing further after so many minutes.  [dim]default: all[/]"
    ),
]
Storage = Annotated[
    str | None,
    _option(
        HOW,
        "WHERE",
        "With --method kvtuner: a file or a database URL (sqlite:///…) that keeps the search, and that several of these commands share.",
    ),
]
Apply = Annotated[Path | None, _option(HOW, "FILE", "Apply this plan instead of making one.", "--plan")]
Edit = Annotated[Path | None, _option(HOW, "PLAN", "Start from this plan instead of a method.")]
Rebalance = Annotated[
    bool, _option(HOW, None, "With --edit: shift the layers evenly until they meet the plan's budget.", "--rebalance")
]
Keep = Annotated[
    list[str] | None, _option(HOW, "GLOB", "With --rebalance: these layers stay as they are (repeatable).")
]

# how: the weights, and the judgement
_SOLVERS = "magnitude, random, wanda, nowag, sparsegpt ([dim]default: wanda[/])."
_QUANTIZERS = "For a plan of bits: round_to_nearest, hqq, gptq ([dim]default: gptq[/]). In factors: [bold]armor[/]."
Solver = Annotated[str | None, _option(HOW, "NAME", f"What computes the new weights: {_SOLVERS} {_QUANTIZERS}")]
Solvers = Annotated[str | None, _option(HOW, "A,B,…", f"Solvers: {_SOLVERS}", "--solver")]
SolverSet = Annotated[
    list[str] | None, _option(HOW, "NAME=VALUE", "A setting of the solver, e.g. damp=0.1 (repeatable).")
]
Propagate = Annotated[
    str,
    _option(
        HOW,
        "WHICH",
        "Later blocks are measured on the outputs of [bold]compressed[/] blocks, or of [bold]dense[/] ones"
        " (one pass, faster, a little worse).",
        show_default=True,
    ),
]
Seeds = Annotated[int, _option(HOW, "N", "Draws of calibration data and of random plans.", min=1, show_default=True)]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="Show this score of every block: outlier-ratio, block-influence, input-modification, zeroth-order or first-order (they"
        " read data), z-score or alpha-hill (weights alone), or snip, grasp, synflow of every layer.",
        show_default=False,
    ),
]
ShownPlan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Show what this plan does to the model: zeros, bits, bits of the KV cache, what is trained how often and how fast.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    _option(OUTPUT, "FILE", "With --score alpha-hill: draw the layers' spectra and the fits to their tails, a PNG."),
]
PlanPlot = Annotated[
    Path | None,
    _option(OUTPUT, "FILE", "Draw the plan, sparsities or bits by block and role, a PNG.", "--plot"),
]
Layers = Annotated[bool, typer.Option("--layers", help="One line per layer instead of one per role.")]
Against = Annotated[str | None, _option(HOW, "MODEL", "The dense model, for divergence and agreement.")]
Convention = Annotated[
    str,
    _option(
        HOW,
        "NAME",
        "Of perplexity: standard, wanda (windows of the whole context) or all (the short last window counts).",
        show_default=True,
    ),
]
Latency = Annotated[
    bool, _option(HOW, None, "Also time prefill and decoding, and count the bytes of the KV cache.", "--latency")
]

# how: a model's fastest form
PassBatch = Annotated[
    int, _option(HOW, "N", "Sequences, or images, in one forward pass.", "--batch", min=1, show_default=True)
]
PassLength = Annotated[
    int,
    _option(HOW, "N", "Tokens in each: 1 is a step of decoding, more a prompt.", "--length", min=1, show_default=True),
]
Rounding = Annotated[
    bool,
    _option(
        HOW, None, "Also try int8 with rounded inputs: outputs then are near the dense ones, not equal.", "--rounding"
    ),
]
StayDense = Annotated[list[str] | None, _option(HOW, "GLOB", "Layers that stay dense (repeatable).", "--exclude")]
RaceSeconds = Annotated[
    float,
    _option(HOW, "S", "About what timing one layer takes; more is surer.", "--seconds", min=0.001, show_default=True),
]

KvBits = Annotated[
    str | None,
    _option(
        HOW,
        "KxVy",
        "Also with a KV cache of so many bits, e.g. K8V4 (each 2, 4, 8 or 16).  [dim]default: what the model's own plan.yaml says[/]",
        "--kv-bits",
    ),
]
KvPlan = Annotated[
    Path | None, _option(HOW, "FILE", "Also with the KV cache that the cache entries of this plan describe.", "--plan")
]
KvMode = Annotated[
    str,
    _option(
        HOW,
        "NAME",
        "With --kv-bits: [bold]per-token[/] (groups of a token's channels) or [bold]kivi[/] (keys in groups of a channel's tokens).",
        "--kv-mode",
        show_default=True,
    ),
]
KvGroup = Annotated[
    int | None,
    _option(
        HOW,
        "N",
        "With --kv-bits: numbers that share a scale.  [dim]default: per-token a whole head, kivi 32[/]",
        "--kv-group",
        min=1,
    ),
]

# data
Data = Annotated[
    str | None,
    _option(
        DATA,
        "DATA",
        "A .txt, .jsonl or .parquet file, hub:NAME[:CONFIG[:SPLIT]], or [bold]python-docs[/]: the standard library of this"
        " Python.  [dim]default for demo: python-docs[/]",
    ),
]
HeldOut = Annotated[
    str | None,
    _option(
        DATA,
        "DATA",
        "Text to measure on.  [dim]default: the calibration source; python-docs holds modules back[/]",
    ),
]
Tokens = Annotated[int | None, _option(DATA, "N", "Only the first so many tokens of the measured text.")]
Bos = Annotated[
    bool,
    _option(
        DATA, None, "Put the BOS token in front of every window, as some models need (Gemma).", "--bos-every-window"
    ),
]
Tasks = Annotated[
    str | None,
    _option(
        DATA,
        "A,B,…",
        "Instead of a text: tasks of lm-evaluation-harness, by name (needs the hub) or as .yaml files of your own, which may work"
        " offline (see examples/lm_eval). Needs layerwise\\[eval].",
    ),
]
Limit = Annotated[int | None, _option(DATA, "N", "Only the first so many documents of each task.", min=1)]
ScoredTokens = Annotated[int, _option(DATA, "N", "Held-out tokens that are scored.", "--tokens", show_default=True)]
Samples = Annotated[int, _option(DATA, "N", "Windows of text that are drawn.", show_default=True)]
Length = Annotated[
    int | None, _option(DATA, "N", "Tokens in a window.  [dim]default: the model's longest, at most 2048[/]")
]
Batch = Annotated[
    int | None, _option(DATA, "N", "Windows in one forward pass.  [dim]default: 1; of images 32[/]", min=1)
]
Seed = Annotated[int, _option(DATA, "N", "Of everything that is drawn.", show_default=True)]

# run
Device = Annotated[
    str,
    _option(
        RUN,
        "DEVICE",
        "cpu, cuda, cuda:1, mps, or auto: the first there is of cuda, mps, cpu. On cuda the whole model if it fits, else block by block.",
        show_default=True,
    ),
]
Dtype = Annotated[str, _option(RUN, "DTYPE", "auto (as stored), float32, bfloat16 or float16.", show_default=True)]
Stream = Annotated[
    bool, _option(RUN, None, "Read each block from disk for its turn: for models larger than memory.", "--stream")
]
Work = Annotated[
    Path | None,
    _option(RUN, "FOLDER", "What is finished, to go on from after a kill.  [dim]default: OUTPUT.work[/]"),
]
Spill = Annotated[
    Path | None,
    _option(
        RUN,
        "FOLDER",
        "Calibration data's activations wait in files there, mapped, not in memory: slower, the same result. On a disk, not in a /tmp"
        " that is memory.",
    ),
]
RemoteCode = Annotated[bool, _option(RUN, None, "Run the Python code that comes with the model.", "--remote-code")]
Debug = Annotated[bool, _option(RUN, None, "Show the traceback of an error.", "--debug")]

# output
Out = Annotated[Path, _option(OUTPUT, "FOLDER", "Folder to write.", "--output", "-o")]
DemoOut = Annotated[Path, _option(OUTPUT, "FOLDER", "Where the best model goes.", "--output", "-o", show_default=True)]
PlanOut = Annotated[Path | None, _option(OUTPUT, "FILE", "plan.yaml, or .json.", "--output", "-o")]
TableOut = Annotated[Path | None, _option(OUTPUT, "FILE", "Also write the table as .md or .html.", "--output", "-o")]
Quiet = Annotated[bool, _option(OUTPUT, None, "Results and errors only, no progress.", "--quiet", "-q")]
Json = Annotated[bool, _option(OUTPUT, None, "The result as JSON on standard output.", "--json")]
Force = Annotated[bool, _option(OUTPUT, None, "Replace the output if it exists.", "--force")]
