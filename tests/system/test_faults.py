"""The fault injection itself: every operation is hit once, and what it leaves is what a full disk or a kill leaves."""

from faults import FAULTS, Scenario, every_fault


class Writing(Scenario):
    def prepare(self):
        import numpy  # noqa: F401
        import safetensors.numpy  # noqa: F401

    def run(self, folder):
        import numpy as np
        from safetensors.numpy import load_file, save_file

        (folder / "below").mkdir()
        (folder / "a.txt").write_text("0123456789")
        (folder / "a.txt").replace(folder / "b.txt")
        save_file({"x": np.arange(9)}, folder / "x.safetensors")
        assert load_file(folder / "x.safetensors")["x"].sum() == 36
        assert (folder / "b.txt").read_text() == "0123456789"
        (folder / "b.txt").unlink()
        (folder / "below").rmdir()

    def check(self, folder, outcome):
        left = sorted(p.name for p in folder.iterdir())
        if outcome.operation.startswith("mkdir"):
            assert left == []
        if (
            outcome.operation.startswith("write")
            and outcome.operation.endswith("a.txt")
            and outcome.fault not in ("EIO", "EIO of writes")
        ):  # flushed once more
            assert (folder / "a.txt").read_text() == "01234"  # half of it
        assert outcome.killed == (outcome.fault == "kill")


def test_every_operation_is_hit(tmp_path):
    found = every_fault("test_faults:Writing", tmp_path)
    for fault in ("ENOSPC", "EIO", "kill"):
        hit = [o.operation.split()[0] for o in found if o.fault == fault]
        assert {"mkdir", "open", "write", "rename", "close"} <= {*hit}
        assert ({"unlink", "rmdir"} <= {*hit}) == (fault != "ENOSPC")
        assert any(o.operation.endswith("x.safetensors") for o in found if o.fault == fault)  # a writer in Rust
        assert ("read" in hit) == (fault == "EIO")
    for fault in FAULTS:
        numbers = [o.number for o in found if o.fault == fault]
        assert numbers == [*range(1, len(numbers) + 1)]
