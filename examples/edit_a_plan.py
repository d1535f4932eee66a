"""A plan is a file that people edit: protect some layers, let the others make up for it, see what changed, apply it.

    python examples/edit_a_plan.py FOLDER [MODEL]

Writes FOLDER/uniform.yaml and FOLDER/edited.yaml. Any text editor does as well: the file has one line a layer, and
`layerwise compress --plan` checks it against the model before any work, naming every entry that does not fit.
"""

import sys
from fnmatch import fnmatchcase
from pathlib import Path

import layerwise as lw
from layerwise.plan import Plan, Prune, diff_plans

PROTECTED = ("*.down_proj", "*.v_proj")
GENTLE = 0.3


def main(folder: str, model: str = "demo") -> Plan:
    """Uniform 60 %, but 30 % in the protected layers: the rest shifts so that the budget is still met to the last weight."""
    network = lw.load(model)
    structure = lw.structure_of(network)
    plan = lw.methods.Uniform(sparsity=0.6).plan(network, structure=structure)
    plan.save(Path(folder) / "uniform.yaml")

    protected = [name for name in plan.layers if any(fnmatchcase(name, pattern) for pattern in PROTECTED)]
    layers = {**plan.layers, **dict.fromkeys(protected, Prune(sparsity=GENTLE))}
    edited = Plan.model_validate({**plan.to_dict(), "layers": layers}).rebalance(structure.layers, keep=PROTECTED)
    edited.check(structure.layers)
    edited.save(Path(folder) / "edited.yaml")

    for change in diff_plans(plan, edited)[:6]:
        print(f"{change.layer}: {change.field} {change.before:.4f} -> {change.after:.4f}")
    result = lw.compress(network, edited, solver=lw.solvers.Magnitude(), structure=structure)
    print(f"{len(protected)} layers protected; {result.sparsity:.4%} zeros, asked for {plan.budget.sparsity:.4%}")
    return edited


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
