from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from ipca.svd.lazy import lazy_property

BOTH = Barrier(2, timeout=30)


class Holder:
    computed = 0

    @lazy_property
    def value(self):
        """Its documentation."""
        self.computed += 1
        BOTH.wait()
        return id(self)


def test_two_threads_compute_at_once_and_each_value_once():
    holders = Holder(), Holder()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda holder: holder.value, holders)) == [id(holder) for holder in holders]
    assert [holder.value for holder in holders] == [id(holder) for holder in holders]
    assert [holder.computed for holder in holders] == [1, 1]
    del holders[0].value
    assert "value" not in vars(holders[0])


def test_the_class_shows_the_attribute_itself():
    assert isinstance(Holder.value, lazy_property)
    assert Holder.value.__doc__ == "Its documentation."
