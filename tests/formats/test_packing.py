"""Bit packing: exact sizes, the layout on disk, round trips and damaged input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fliqs_hf.errors import FormatError
from fliqs_hf.formats import pack, packed_bytes, unpack

ALL_BITS = range(1, 17)


def random_codes(numel: int, bits: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 2**bits, (numel,), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.uint8 if bits <= 8 else torch.int32)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_round_trip_of_every_length_around_the_byte_boundaries(bits: int) -> None:
    for numel in (*range(35), 1000, 1001, 4096):
        codes = random_codes(numel, bits)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(numel, bits),)
        back = unpack(packed, bits, numel)
        assert back.dtype == codes.dtype
        assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_code_at_every_position(bits: int) -> None:
    step = max(1, 2**bits // 256)
    codes = torch.arange(0, 2**bits, step)
    for shift in range(8):
        moved = codes.roll(shift)
        assert torch.equal(unpack(pack(moved, bits), bits, moved.numel()).long(), moved)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_no_byte_is_wasted(bits: int) -> None:
    for numel in (0, 8, 64, 192 * 768):
        assert packed_bytes(numel, bits) == numel * bits // 8  # 3-bit codes take exactly 3 bits
    planes = bits // 8 + (bits % 8).bit_count()
    for numel in range(1, 40):
        # At most the last byte of each plane is shared with nothing.
        assert 0 <= packed_bytes(numel, bits) - numel * bits / 8 < planes


def test_layout_is_the_documented_one() -> None:
    # 3 bits = a plane of the low 2 bits, then one of the high bit; 5 codes -> 2 + 1 bytes, n = 2 and n = 1.
    codes = torch.tensor([0b101, 0b110, 0b011, 0b100, 0b111], dtype=torch.uint8)
    low_0 = 0b01 | 0b11 << 2 | 0b11 << 4  # codes 0, 2, 4
    low_1 = 0b10 | 0b00 << 2  # codes 1, 3
    high = 0b11011  # codes 4, 3, 2, 1, 0
    assert pack(codes, 3).tolist() == [low_0, low_1, high]
    # 4 bits: the first half of the codes in the low nibbles, the second half in the high ones.
    assert pack(torch.tensor([1, 2, 3, 4]), 4).tolist() == [0x31, 0x42]
    assert pack(torch.tensor([0x1234, 0xABCD]), 16).tolist() == [0x34, 0xCD, 0x12, 0xAB]
    assert pack(torch.tensor([7, 255]), 8).tolist() == [7, 255]


def test_any_shape_and_stride_is_taken_in_row_major_order() -> None:
    codes = random_codes(60, 5).reshape(3, 4, 5)
    assert torch.equal(unpack(pack(codes, 5), 5, 60), codes.reshape(-1))
    assert torch.equal(unpack(pack(codes.mT, 5), 5, 60), codes.mT.reshape(-1))
    assert torch.equal(unpack(pack(codes, 5)[:], 5, 60).reshape(3, 4, 5), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_code_dtypes_pack_alike(dtype: torch.dtype) -> None:
    codes = random_codes(50, 7)
    assert torch.equal(pack(codes.to(dtype), 7), pack(codes, 7))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_packed_tensor_of_another_length_is_refused(bits: int) -> None:
    packed = pack(random_codes(100, bits), bits)
    for damaged in (packed[:-1], torch.cat([packed, packed[:1]]), packed[:0]):
        with pytest.raises(FormatError, match=rf"100 codes of {bits} bits are torch.uint8 \[{packed.numel()}\]"):
            unpack(damaged, bits, 100)


def test_packed_tensor_must_be_flat_bytes() -> None:
    packed = pack(random_codes(16, 4), 4)
    for damaged in (packed.reshape(2, 4), packed.to(torch.int8), packed.float()):
        with pytest.raises(FormatError, match="16 codes of 4 bits are"):
            unpack(damaged, 4, 16)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([0, 8]), 3, "code 8 does not fit 3 bits: codes are 0 to 7"),
        (torch.tensor([-1, 3]), 3, "code -1 does not fit 3 bits"),
        (torch.tensor([65536]), 16, "code 65536 does not fit 16 bits"),
        (torch.tensor([1.0]), 3, "codes are torch.float32"),
        (torch.tensor([True]), 1, "codes are torch.bool"),
        (torch.tensor([1]), 0, "bits=0: codes have 1 to 16 bits"),
        (torch.tensor([1]), 17, "bits=17"),
    ],
)
def test_pack_refuses_codes_that_do_not_fit(codes: Tensor, bits: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        pack(codes, bits)


def test_sizes_refuse_nonsense() -> None:
    with pytest.raises(FormatError, match="numel=-1"):
        packed_bytes(-1, 4)
    with pytest.raises(FormatError, match="bits=17"):
        unpack(torch.zeros(1, dtype=torch.uint8), 17, 1)
