"""Lines about the progress of a run."""

from qformer_captioner.captioning.items import Item
from qformer_captioner.captioning.reporting import Reporter
from qformer_captioner.captioning.run import Wanted
from qformer_captioner.captioning.sidecars import Sidecars
from qformer_captioner.captioning.sources import NamesSource
from qformer_captioner.captioning.writer import Writer


def test_images_that_are_skipped_or_repeated_do_not_remain(tmp_path):
    names = [str(tmp_path / name) for name in ("a.png", "b.png", "b.png", "c.png")]
    (tmp_path / "a.txt").write_text("a dog")
    wanted = Wanted((Item(name, name, name, name) for name in names), Writer([Sidecars(".txt")], None))
    reporter = Reporter(NamesSource(names), wanted, prints=False)
    with reporter:
        reporter.counter.join()
        assert [item.key for item in wanted] == [names[1], names[3]]
    assert "2 remaining" in reporter.line()
