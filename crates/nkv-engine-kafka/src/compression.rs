//! What other producers compressed. All of it in Rust, and no more than [`LEN_MAX`] bytes of a batch.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use kafka_protocol::records::Compression;

/// Longest batch, unpacked: several times the longest that a broker is set up for in practice.
const LEN_MAX: usize = 256 << 20;

/// How Java's snappy begins; behind it come blocks, each behind its length.
const SNAPPY_BLOCKS: &[u8; 8] = b"\x82SNAPPY\x00";
const SNAPPY_HEAD_LEN: usize = 16;

/// The records of a batch, unpacked.
pub(crate) fn decompress(bytes: &mut Bytes, compression: Compression) -> io::Result<Bytes> {
    let packed = std::mem::take(bytes);
    match compression {
        Compression::None => Ok(packed),
        Compression::Gzip => whole(flate2::read::MultiGzDecoder::new(packed.reader())),
        Compression::Lz4 => whole(lz4_flex::frame::FrameDecoder::new(packed.reader())),
        Compression::Zstd => {
            let mut rest = packed.reader();
            whole(ruzstd::decoding::StreamingDecoder::new(&mut rest).map_err(io::Error::other)?)
        }
        Compression::Snappy => snappy(packed),
    }
}

fn whole(packed: impl Read) -> io::Result<Bytes> {
    let mut unpacked = Vec::new();
    packed.take(LEN_MAX as u64 + 1).read_to_end(&mut unpacked)?;
    if unpacked.len() > LEN_MAX { Err(too_long()) } else { Ok(unpacked.into()) }
}

fn snappy(mut packed: Bytes) -> io::Result<Bytes> {
    if !packed.starts_with(SNAPPY_BLOCKS) {
        return block(&packed, LEN_MAX).map(Bytes::from);
    }
    packed.advance(SNAPPY_HEAD_LEN.min(packed.len()));
    let mut unpacked = Vec::new();
    while packed.has_remaining() {
        let len = packed.try_get_u32().map_err(io::Error::other)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > packed.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        unpacked.extend(block(&packed.split_to(len), LEN_MAX.saturating_sub(unpacked.len()))?);
    }
    Ok(unpacked.into())
}

fn block(packed: &[u8], len_max: usize) -> io::Result<Vec<u8>> {
    if snap::raw::decompress_len(packed)? > len_max {
        return Err(too_long());
    }
    Ok(snap::raw::Decoder::new().decompress_vec(packed)?)
}

fn too_long() -> io::Error {
    io::Error::other(format!("a batch has more than {LEN_MAX} bytes, unpacked"))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        // What brokers send is seen in the tests against one; here, that nothing of it panics.
        #[test]
        fn bytes_that_are_not_packed_are_an_error(bytes in vec(any::<u8>(), 0..200), blocks: bool) {
            let head = if blocks { &b"\x82SNAPPY\x00\x00\x00\x00\x01\x00\x00\x00\x01"[..] } else { &[] };
            let bytes = Bytes::from([head, &bytes].concat());
            for kind in [Compression::Gzip, Compression::Lz4, Compression::Zstd, Compression::Snappy] {
                let _ = decompress(&mut bytes.clone(), kind);
            }
            prop_assert_eq!(decompress(&mut bytes.clone(), Compression::None).unwrap(), bytes);
        }
    }

    #[test]
    fn what_would_take_too_much_memory_is_refused() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let part = vec![0; 1 << 20];
        for _ in 0..=LEN_MAX >> 20 {
            std::io::Write::write_all(&mut gzip, &part).unwrap();
        }
        let packed = Bytes::from(gzip.finish().unwrap());
        assert!(decompress(&mut packed.clone(), Compression::Gzip).is_err(), "{} bytes became all of it", packed.len());
        // Its head says that it is longer than all memory.
        assert!(decompress(&mut Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 0x0f]), Compression::Snappy).is_err());
    }
}
