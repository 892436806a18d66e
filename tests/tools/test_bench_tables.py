"""What bench makes of its rows: tables, documents, pictures, reports; and how its scripts are called."""

import argparse
import importlib
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import budget
import cli
import compare
import cost
import documents
import matplotlib
import micro
import minilm
import plot
import pytest
import rows
import table
from found import Found, break_even, device_files, load
from matplotlib.text import Text
from registry import Work

BENCH = Path(table.__file__).parent

# ---- rows and tables


def test_rows_refuse_a_file_with_other_columns(tmp_path):
    path = tmp_path / "results" / "a.csv"
    rows.append(path, [{"op": "linear"}])
    rows.append(path, [{"op": "ffn"}])
    assert [row["op"] for row in rows.read(path)] == ["linear", "ffn"]
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="expected the columns"):
        rows.append(path, [{"op": "linear"}])


@pytest.mark.parametrize("path", device_files(), ids=lambda path: path.stem)
def test_every_results_file_has_our_columns_and_renders(path):
    all_rows = rows.read(path)
    assert list(all_rows[0]) == list(rows.FIELDS)
    for row in all_rows:
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
    found = Found(all_rows)
    kind = {"cpu": "cpu", "cuda": "gpu"}[found.kind]
    made = table.tables([found])
    assert {name for name, text in made.items() if text} == {"nets", kind, f"{kind}-ms"}
    for name in (kind, f"{kind}-ms"):
        assert rows.device_name(all_rows[-1]["device"]) in made[name]
        assert all_rows[-1]["torch"] in made[name]
        for work in found.works():
            assert f"| {work.title}" in made[name]


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("L0KERNELS_COMMIT", "abc")
    assert rows.commit() == "abc"
    assert rows.slug("NVIDIA H200 (x)") == "nvidia-h200-x"


WORK = Work("linear", (512, 4096, 4096), "cpu", "a layer", targets={0.5: (0.27, 0.54), (3, 2): (0.4, None)})


def row(**values):
    base = dict.fromkeys(rows.FIELDS, "")
    base |= {"op": "linear", "shape": "512x4096x4096", "dtype": "float32", "pass": "fwd+bwd", "mode": "eager"}
    return base | {"provider": "cpp", "ms": "1", "device": "a CPU", "date": "d"} | values


def test_the_newest_row_counts_and_verdicts_name_what_is_missed():
    found = Found(
        [
            row(keep="0.5", stock="0.9", fair="0.9"),
            row(keep="0.5", stock="0.54", fair="0.5"),
            row(keep="3-2", stock="0.3", fair="0.3"),
        ]
    )
    assert [r["stock"] for r in found.rows] == ["0.54", "0.3"]
    text = table.targets([WORK], found)
    assert "| - | - | 0.54 / 0.50 | - | - |" in text
    assert "| · target | - | - | 0.27 / 0.54 | - | - |" in text
    assert "| · verdict | - | - | +100 % / met | - | - |" in text
    assert "| · 3-2 open: 0.30 / 0.30, target 0.4 / -, met / - |" in text


def test_a_table_holds_only_lines_and_columns_that_were_measured():
    found = Found(
        [
            row(keep="0.5", stock="0.54", fair="0.5", commit="abc"),
            row(keep="3-2", stock="0.3", fair="0.3", commit="def"),
        ]
    )
    nothing = table.ratio_lines(replace(WORK, shape=(1, 2, 3)), found)
    text = table.render(
        ["ratio", "1", ".9", ".5", ".25", ".1", "even"], [*table.ratio_lines(WORK, found), *nothing]
    )
    assert text.splitlines() == [
        "| ratio | .5 | even |",
        "|---|---|---|",
        "| a layer | 0.54 / 0.50 | ≥ .50 / ≥ .50 |",
        "| the same, 3-2 units open: 0.30 / 0.30 |  |  |",
        "",
        "a CPU, commits abc and def, d. Measured by `make bench-cpu`.",
    ]
    assert table.render(["ratio", "1"], nothing) == ""


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ([(1.0, 0.9), (0.5, 0.5)], 1.0),
        ([(1.0, 1.2), (0.9, 1.1), (0.5, 0.7), (0.1, 0.2)], 0.8),
        ([(1.0, 1.2), (0.5, 1.1)], None),
        ([(1.0, 1.5), (0.0, 1.0)], 0.0),
        ([], None),
    ],
)
def test_break_even_is_interpolated(curve, wanted):
    found = break_even(curve)
    assert found == wanted if wanted is None else found == pytest.approx(wanted)


def test_a_break_even_that_was_not_looked_for_is_not_called_none():
    assert table.even_cell([(1.0, 1.5), (0.1, 1.2)]) == "none"
    assert table.even_cell([(0.5, 3.0)]) == table.even_cell([]) == "-"
    assert table.even_cell([(0.5, 0.8)]) == "≥ .50"
    assert table.even_cell([(1.0, 0.8)]) == "1.00"


def test_times_are_those_of_the_ways_that_were_measured():
    found = Found([row(keep="1", provider="dense", ms="7"), row(keep="0.5", provider="dense", ms="8")])
    text = table.times([found], "cpu")
    assert "| ms at keep 1 / .5 / .1 | torch.nn, dense |\n" in text
    assert "| linear 512 x 4096 x 4096 | 7 / 8 / - |\n" in text


NET = {"op": "resnet18", "shape": "16x3x64x64", "pass": "step", "provider": "nn"}
ON_GPU = {"op": "chain", "shape": "100x784x300x100x10", "pass": "step", "mode": "graph", "provider": "cuda"}


def test_the_small_table_takes_the_newest_machine_and_names_what_is_faster_than_stock():
    ratios = {"1": ("1.2", "1.4"), "0.5": ("0.6", "0.9"), "0.1": ("0.2", "0.2")}

    def net(**values):
        return Found([row(keep=k, stock=s, fair=f, **NET | values) for k, (s, f) in ratios.items()])

    old, new = net(date="2026-01-01", device="old"), net(date="2026-01-02", device="new", commit="abc")
    text = table.nets([new, old])
    assert "old" not in text
    assert text == table.nets([old, new])
    assert text.splitlines()[2:] == [
        "| ResNet-18, 16 images of 64 x 64 | 0.60 | 0.20 | .83 |",
        "",
        "CPU: new, commit abc, 2026-01-02.",
        "Against the fastest dense variant, at keep .5: CPU ResNet-18 0.90.",
    ]
    gpu = Found([row(keep="0.5", stock="3", fair="3", environment="CUDA 13", device="a GPU", **ON_GPU)])
    head, _, first, second, *_ = table.nets([new, gpu]).splitlines()
    assert head.count("break-even keep") == 2
    assert first == "| ResNet-18, 16 images of 64 x 64 | 0.60 | 0.20 | .83 |  |  |  |"
    assert second == "| LeNet-300-100, batch 100 |  |  |  | 3.00 |  |  |"
    assert table.nets([]) == ""


def test_origins_tell_all_commits_and_the_days_between():
    several = [row(commit=c, date=d, torch="2.13") for c, d in (("a", "2"), ("b", "1"), ("c", "3"))]
    assert rows.machine(several) == "a CPU, torch 2.13, commits a, b and c, 1 to 3"
    assert rows.machine([row(device="AMD EPYC 25-17")]) == "AMD EPYC (Zen 4, AVX-512), d"


# ---- documents


def test_the_documents_show_what_the_results_give(capsys):
    assert table.main(["--check"]) == 0, capsys.readouterr().out


def test_the_steps_of_budgets_are_timed(capsys, threads):
    assert budget.main(["--steps", "--quick"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1:3] for row in rows[2:5]] == [["1,184", "3"], ["1,370", "4"], ["36,864", "24"]]


def test_the_manual_shows_what_budgets_gave(capsys):
    assert budget.main(["--check"]) == 0, capsys.readouterr().out
    found = rows.read(budget.PATH)
    assert len(found) == 81
    assert (
        len({tuple(row[name] for name in ("keep", "gate_lr", "loss_times", "seed")) for row in found}) == 81
    )


def test_the_manual_shows_how_the_encoder_was_pruned(capsys):
    assert minilm.main(["--check"]) == 0, capsys.readouterr().out
    found = rows.read(minilm.PATH)
    own = found[:3]
    assert [row["name"] for row in own] == ["teacher", "gated, eval()", "exported"]
    assert minilm.replaced(own, own[::-1]) == own[::-1]
    assert minilm.replaced(own, [own[0] | {"seed": "7"}])[:3] == own
    smaller = found[0] | {"name": "exported", "parameters": "5323392", "encode_ms": "", "step_ms": ""}
    lines = minilm.table([found[0], smaller]).splitlines()
    assert lines[2].startswith("| teacher | 1.000 | 1.000 |")
    assert lines[3].startswith("| exported, 500 steps to 0.5 | 0.500 | ")


def place(name, text="old\n"):
    return f"<!-- table: {name} -->\n{text}<!-- end -->\n"


def test_tables_are_written_between_their_markers_and_compared(tmp_path, capsys):
    readme, benchmarks = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text(f"# a\n\n{place('nets')}\nb\n")
    made = {name: f"| {name} |\n\nfrom" for name in (*table.TABLES, "paper", "wrn", "zoo", "zoo-steps")}
    assert documents.main(made, write=False, root=tmp_path) == 1
    assert "README.md: table nets: not what the results give" in capsys.readouterr().out
    assert "old" in readme.read_text()
    benchmarks.parent.mkdir()
    benchmarks.write_text("".join(map(place, documents.DOCUMENTS["docs/benchmarks.md"])))
    assert documents.main(made, write=True, root=tmp_path) == 0
    assert readme.read_text() == "# a\n\n<!-- table: nets -->\n| nets |\n\nfrom\n<!-- end -->\n\nb\n"
    assert "<!-- table: gpu-ms -->\n| gpu-ms |\n\nfrom\n<!-- end -->\n" in benchmarks.read_text()
    assert documents.main(made, write=False, root=tmp_path) == 0
    capsys.readouterr()
    benchmarks.write_text(benchmarks.read_text().replace("| gpu |", "| edited |"))
    assert documents.main(made, write=False, root=tmp_path) == 1
    told = capsys.readouterr().out
    assert "docs/benchmarks.md: table gpu: not what" in told
    assert "README.md: as the results give it" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker\n", "README.md: expected a place for the table nets: <!-- table: nets -->"),
        ("<!-- table: nets -->\nold\n", "got 1 and 0"),
        (place("nets") + place("nets"), "each name once"),
        (place("nets", place("cpu")), "got 2 and 2"),
        (place("nets") + place("nest"), r"got \['nest'\]"),
    ],
)
def test_wrong_markers_are_refused(tmp_path, text, message):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        documents.main(dict.fromkeys(table.TABLES, "| a |"), write=True, root=tmp_path)
    assert path.read_text() == text


def test_documents_show_all_machines(capsys):
    with pytest.raises(SystemExit):
        table.main(["--write", "a.csv"])
    assert "expected no paths" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table.main(["a.csv"])
    assert "a.csv: no such file" in capsys.readouterr().err


def test_the_table_of_primitives_names_the_faster_backend_and_the_default():
    common = {"op": "sample", "shape": "1x784", "keep": "0.5", "pass": "fwd", "mode": "graph"}
    common |= {"ms_p20": "0.001", "ms_p80": "0.003"}
    found = [row(provider=name, ms=ms, **common) for name, ms in (("triton", "0.003"), ("cuda", "0.002"))]
    text = table.micro(found)
    default = micro.default_of("sample", ["triton", "cuda"])
    note = "cuda" if default == "cuda" else "triton, 50 % slower"
    assert f"triton 3 (1-3); cuda 2 (1-3) | cuda | {note} |" in text
    assert micro.default_of("unpack_rows_dz", ["torch", "cpp"]) == "cpp"
    assert micro.default_of("small_chain", ["triton", "cuda"]) == "cuda"


# ---- what is made of the rows


def sweep(**values):
    ratios = {"1": "1.2", "0.5": "0.6", "0.1": "0.2"}
    return [row(keep=keep, stock=ratio, fair=ratio, **values) for keep, ratio in ratios.items()]


def test_compare_names_only_what_exceeds_the_spread(tmp_path, capsys):
    same = {"ms_p20": "0.9", "ms_p80": "1.1"}
    first = [row(keep="1", ms="1", **same), row(keep="0.5", ms="1", **same), row(keep="0.1", ms="1", **same)]
    second = [
        row(keep="1", ms="1.05", ms_p20="1", ms_p80="1.2"),
        row(keep="0.5", ms="2", ms_p20="1.9", ms_p80="2.1", commit="abc"),
    ]
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    rows.append(a, first)
    rows.append(b, second)
    assert compare.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "| 1 | 2 | 2.000 | 10.0 %, 5.0 % | slower |" in out
    assert "1.050" not in out
    assert "2 rows in both, 1 only in A, 0 only in B: 0 faster, 1 slower, 1 within the spread" in out
    assert compare.main([str(a), str(b), "--fail-above", "0.5"]) == 1
    assert compare.main([str(a), str(b), "--fail-above", "1.5"]) == 0
    assert compare.main([str(b), str(a), "--all"]) == 0
    assert "| faster |" in capsys.readouterr().out
    assert [r["keep"] for r in compare.load(f"{b}@abc")] == ["0.5"]
    with pytest.raises(SystemExit):
        compare.main([str(a), f"{b}@none"])


def test_plots_come_from_rows_and_say_where_they_are_from(tmp_path, capsys):
    path = tmp_path / "a-cpu.csv"
    dense = row(keep="1", provider="dense", stock="1")
    rows.append(path, [*sweep(provider="cpp"), *sweep(provider="masked"), dense, *sweep(**NET)])
    speedup, nets = tmp_path / "a-cpu-speedup.svg", tmp_path / "nets-cpu.svg"
    assert plot.main([str(path), "--check"]) == 1
    assert plot.main([str(path)]) == 0
    text = speedup.read_text()
    for words in ("linear 512 x 4096 x 4096", "as fast as dense at keep 0.83", "1 / keep", "a CPU"):
        assert f"<!-- {words}" in text, words
    assert "<!-- ResNet-18 -->" in nets.read_text()
    assert plot.main([str(path), "--check"]) == 0
    plot.main([str(path)])
    assert speedup.read_text() == text  # the same rows, the same bytes
    rows.append(path, [dense])
    capsys.readouterr()
    assert plot.main([str(path), "--check"]) == 1
    assert f"{speedup}: older than its rows" in capsys.readouterr().out


def test_pictures_in_the_repository_are_of_its_rows(capsys):
    assert plot.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "picture", list(plot.pictures(plot.result_files())), ids=lambda picture: picture.out.stem
)
def test_words_of_a_picture_lie_within_it_and_apart_from_each_other(picture):
    with matplotlib.rc_context(plot.SETTINGS):
        figure = picture.draw()
        figure.draw_without_rendering()
        hidden = set()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
            hidden |= {label for label, at in ticks if not low <= at <= high}
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in hidden]
        boxes = {t: t.get_window_extent() for t in texts}
    assert figure.bbox.width == pytest.approx(plot.WIDTH)
    for text, box in boxes.items():
        assert text.get_fontsize() >= 10.5
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1), text
        assert figure.bbox.containsy(box.y0)
        assert figure.bbox.containsy(box.y1), text
    for a, b in combinations(boxes, 2):
        assert not boxes[a].padded(-2).overlaps(boxes[b].padded(-2)), (a, b)
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_title("left") or len(figure.axes) == 1


def test_the_cost_report_names_what_limits():
    assert cost.limit(8.0, 1.0, 10.0) == "compute"
    assert cost.limit(1.0, 8.0, 10.0) == "memory"
    assert cost.limit(1.0, 1.0, 10.0) == "fixed costs"
    assert cost.limit(1.0, None, 10.0) == ""
    dense = row(keep="1", provider="dense", tflops="0.2", ms="100")
    copy = row(op="copy", keep="1", provider="copy", gbps="40")
    ours = row(keep="0.5", ms="150", tflops="0.17")
    text = cost.report([WORK], Found([dense, copy, ours]))
    assert "| 0.5 | cpp | 25.8 | 176 | 129 | 4.4 | 150 | 86% | compute |" in text
    assert cost.open_share(replace(WORK, gate_sizes=(6, 4)), "3-2") == [0.5, 0.5]


# ---- how the scripts are called

SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "__main__" in path.read_text())


class Parsed(Exception):
    pass


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_a_paragraph_and_an_example_that_parses(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert not end.value.code
    help_, example = capsys.readouterr().out.strip().rsplit("\n\n", 1)
    assert "\n\n" not in script.__doc__.strip()  # one paragraph
    assert " ".join(script.__doc__.split()) in " ".join(help_.split())
    assert example.startswith(f"Example: python bench/{name}.py ")
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, argv):
        parse(parser, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        script.main(shlex.split(example)[3:])
    assert (BENCH / f"{name}.py").read_text().endswith("    cli.run(main)\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_script_whose_output_is_cut_ends_without_a_traceback(lines):
    code = f"import cli; cli.run(lambda: print('a line\\n' * {lines}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=BENCH, stdout=-1, stderr=-1, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
    process.stderr.close()
    assert (
        subprocess.run(
            [sys.executable, "-c", "import cli; cli.run(lambda: 3)"], cwd=BENCH, check=False
        ).returncode
        == 3
    )


def test_results_are_loaded_from_files_that_are_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load([tmp_path / "a.csv"])
    assert cli.parser("a", "b.py --c").epilog == "Example: python bench/b.py --c"
