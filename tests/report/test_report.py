"""The command, from a folder to a page."""

import os
import re
import subprocess
import sys

import pytest

from consistency.report.report import main


def test_a_report(two_metrics, study, capsys):
    study.grid("l2-seed0")
    study.status("pseudo_huber-seed1", state="failed", step=7, error="X: <b>y</b>")
    assert main([str(two_metrics)]) == 0
    out = two_metrics / "report"
    text, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "| l2 | 32.0 ± 2.8 | 16.0 ± 1.4 | 2 | 200 | 1 min 00 s | 2 finished |" in text
    assert "failed at step 7" in text
    assert "X: &lt;b&gt;y&lt;/b&gt;" in text
    assert "<b>y</b>" not in page
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert sorted(pictures) == sorted(path.name for path in out.glob("*.png"))
    assert {"choice_metric.png", "curve_fd_classifier_onestep.png", "curve_loss.png", "samples_onestep.png"} <= set(
        pictures
    )
    assert page.count("data:image/png;base64,") == len(pictures)
    shown = capsys.readouterr().out
    assert "32.0 ± 2.8" in shown
    assert str(out / "report.html") in shown


def test_one_score(two_metrics):
    assert main([str(two_metrics), "--score", "fd_classifier_twostep"]) == 0
    text = (two_metrics / "report" / "README.md").read_text()
    assert "classifier_onestep" not in text
    assert main([str(two_metrics), "--score", "fd_classifier"]) == 0
    assert "onestep" in (two_metrics / "report" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "no runs in ."),
        (["outputs/metrics", "--score", "fid"], "these runs have: fd_classifier_onestep, fd_classifier_twostep"),
        (["outputs/metrics", "--out", "taken"], "taken/README.md was not written by consistency-report"),
        (["outputs/metrics", "--out", "taken2"], "taken2/report.html was not written by consistency-report"),
        (["outputs/metrics", "--out", "file"], "file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(two_metrics, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").write_text("# mine\n")
    (tmp_path / "taken2").mkdir()
    (tmp_path / "taken2" / "report.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert said in captured.err
    assert (tmp_path / "taken" / "README.md").read_text() == "# mine\n"
    assert (tmp_path / "taken2" / "report.html").read_text() == "mine"


def test_again_keeps_notes_and_drops_old_pictures(two_metrics, study):
    study.grid("l2-seed0")
    out = two_metrics / "report"
    main([str(two_metrics)])
    readme = out / "README.md"
    readme.write_text(readme.read_text() + "\n![mine](mine.png)\n\nDigits show <it> too.\n")
    (out / "mine.png").write_bytes(b"x")
    (two_metrics / "l2-seed0" / "samples" / "onestep_000000200.png").unlink()
    assert main([str(two_metrics)]) == 0
    assert readme.read_text().endswith("\n\nDigits show <it> too.\n")
    assert "Digits show &lt;it&gt; too." in (out / "report.html").read_text()
    assert not (out / "samples_onestep.png").exists()
    assert (out / "mine.png").exists()
    assert not list(out.glob(".*"))


def test_names_of_pictures_are_safe_and_differ(study):
    folder = study.run("a", "seed=0")
    text = (folder / "quality.jsonl").read_text()
    odd = text.replace("fd_classifier", "../../a b") + text.replace("fd_classifier", "../../a/b")
    (folder / "quality.jsonl").write_text(odd)
    assert main([str(study.note())]) == 0
    curves = sorted(path.name for path in (study.path / "report").glob("curve_*.png"))
    assert len(curves) == 5
    assert not list(study.path.parent.glob("*.png"))


def test_nothing_finished_is_a_report_too(study, capsys):
    study.run("a", "seed=0", state="running")
    assert main([str(study.note(("b", ["seed=1"])))]) == 0
    assert "0 of 2 runs are finished; 1 unfinished at step 20, 1 not started." in capsys.readouterr().out


def test_every_kind_of_damage_at_once(two_metrics, study):
    (two_metrics / "l2-seed0" / "status.json").write_text("")
    (two_metrics / "l2-seed1" / "config.yaml").unlink()
    (two_metrics / "pseudo_huber-seed0" / "quality.jsonl").write_bytes(b"\xff\xfe{\n[]\n")
    (two_metrics / "pseudo_huber-seed1" / "metrics.csv").write_bytes(b"\x00,,\n1,2\n")
    study.run("single", "seed=4", seed=4, listed=False)
    (two_metrics / "study.json").write_text("{")
    assert main([str(two_metrics)]) == 0
    text = (two_metrics / "report" / "README.md").read_text()
    for said in (
        "unreadable: status.json",
        "unreadable: config.yaml",
        "lines of quality.jsonl (2 damaged)",
        "Damaged: study.json",
    ):
        assert said in text


def test_it_starts_without_torch(two_metrics):
    code = (
        "import sys; from consistency.cli import report\n"
        "try: report()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'lightning', 'wandb', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(two_metrics)], capture_output=True, text=True, env={**os.environ}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
