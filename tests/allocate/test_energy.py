"""The energy model by hand, its tables and files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.allocate import TABLES, EnergyTable, energy_table
from layerwise.errors import ConfigError, PlanError


def test_a_block_by_hand():
    """2 x 3, 5 uses, one pJ each: 30 multiply-adds; 6 + 5 * (3 + 4) numbers on chip; 6 numbers and a place off chip."""
    table = EnergyTable(mac=1, sram=1, dram=1, bytes=2, index_bytes=4)
    assert table.of_block(2, 3, 5) == 30 + 2 * 41 + (12 + 4)
    assert table.of_activations(8, 6, 5) == 2 * 5 * 14
    assert table.block_bytes(2, 3) == 16


def test_the_built_in_tables_are_horowitzs():
    half, single, whole = TABLES["float16"], TABLES["float32"], TABLES["int8"]
    assert (half.mac, single.mac, whole.mac) == pytest.approx((0.4 + 1.1, 0.9 + 3.7, 0.1 + 0.2))
    assert {table.sram for table in TABLES.values()} == {20 / 8}
    assert {table.dram for table in TABLES.values()} == {1300 / 8}
    assert (half.bytes, single.bytes, whole.bytes) == (2, 4, 1)


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.5, 1000))
def test_larger_blocks_move_less_for_the_same_work(height, width, uses):
    table = TABLES["float32"]
    assert table.of_block(2 * height, 2 * width, uses) < 4 * table.of_block(height, width, uses)


def test_a_file_of_your_own(tmp_path):
    for name, text in (("t.yaml", "mac: 0.25\ndram: 1e2\n"), ("t.json", '{"mac": 0.25, "dram": 100}')):
        (tmp_path / name).write_text(text)
        table = energy_table(str(tmp_path / name))
        assert (table.mac, table.dram, table.sram) == (0.25, 100, 2.5)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("mac: -1", ConfigError, "mac=-1: give a finite number"),
        ("mac: .inf", ConfigError, "mac=inf"),
        ("mac: true", ConfigError, "mac=True"),
        ("mac: cheap", ConfigError, "mac='cheap'"),
        ("macs: 1", ConfigError, 'unknown entry "macs". Did you mean "mac"'),
        ("- 1", ConfigError, "no mapping in it"),
        ("", ConfigError, "no mapping in it"),
        ("mac: [1", PlanError, "not valid YAML"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, error, words):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(error) as caught:
        energy_table(str(tmp_path / "t.yaml"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "float16"'):
        energy_table("float17")
    with pytest.raises(ConfigError, match="cannot be read"):
        energy_table(str(tmp_path / "absent.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        energy_table(str(tmp_path / "b.yaml"))
