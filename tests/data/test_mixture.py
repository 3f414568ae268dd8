"""Mixtures of data sets by weight."""

from collections import Counter

from qformer_captioner.data.mixture import CaptionMixture

from ..fixtures.captioned_files import captioned, numbered


def test_a_mixture_has_exactly_the_shares_of_its_weights(folder):
    a, b = captioned(numbered(folder, "a", 60)), captioned(numbered(folder, "b", 4))
    data = CaptionMixture([a, b], [3, 1])
    epochs = []
    for epoch in range(5):
        data.set_epoch(epoch)
        epochs.append([data[row]["captions"][0] for row in range(len(data))])
    for rows in epochs:
        assert Counter(row[0] for row in rows) == {"a": 12, "b": 4}
        assert len(set(rows)) == len(rows), "no row twice"
    assert len({row for rows in epochs for row in rows if row[0] == "a"}) == 60, (
        "each epoch continues behind the one before"
    )
    assert len(data.references()) == 64
