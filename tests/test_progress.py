import multiprocessing

import pytest

from otter_hf.progress import with_progress


def kind_of_bar(items, connection):
    connection.send(type(with_progress(items)).__name__)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_a_forked_process_draws_no_bar_whose_lock_it_would_share():
    items = [1, 2]
    assert with_progress(items) is not items and [*with_progress(items)] == items
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=kind_of_bar, args=(items, there))
    process.start()
    process.join()
    assert here.recv() == "list"
