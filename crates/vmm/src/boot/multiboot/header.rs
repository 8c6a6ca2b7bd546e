//! The Multiboot header: where in a file it is and what it asks for (Multiboot specification
//! 0.6.96 §3.1).

use crate::error::KernelProblem;

const MAGIC: u32 = 0x1bad_b002;
/// The header lies in this many bytes at the start of the file, wholly.
const SEARCHED: usize = 8192;
/// Its alignment in the file.
const ALIGNMENT: usize = 4;
/// Where the address fields are in it.
const ADDRESSES: usize = 12;

/// Bit 0: modules begin on page boundaries. They always do.
const FLAG_ALIGN_MODULES: u32 = 1 << 0;
/// Bit 1: memory sizes are told. They always are.
const FLAG_MEMORY: u32 = 1 << 1;
/// Bit 2: the video mode is told.
const FLAG_VIDEO: u32 = 1 << 2;
/// Bit 16: the address fields tell where the kernel goes, whatever else the file is.
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Bits 0 to 15 are requirements: a loader that does not know one must refuse.
const REQUIREMENTS: u32 = 0xffff;
const KNOWN: u32 = FLAG_ALIGN_MODULES | FLAG_MEMORY | FLAG_VIDEO;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Its offset in the file.
    pub(super) offset: usize,
    /// Whether a video mode is asked for.
    pub(super) video: bool,
    /// The address fields, where they count.
    pub(super) addresses: Option<Addresses>,
}

/// Physical addresses of the kernel's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Of the header itself, which ties addresses to file offsets.
    pub(super) header: u32,
    /// Where text begins.
    pub(super) load: u32,
    /// Where data ends; 0: with the file.
    pub(super) load_end: u32,
    /// Where the BSS ends; 0: there is none.
    pub(super) bss_end: u32,
    pub(super) entry: u32,
}

/// The header of `file`, or what is wrong with what begins like one. `None` if nothing does.
pub(crate) fn find(file: &[u8]) -> Option<Result<Header, KernelProblem>> {
    let searched = &file[..file.len().min(SEARCHED)];
    let mut broken = None;
    for offset in (0..searched.len()).step_by(ALIGNMENT) {
        let Some([MAGIC, flags, checksum]) = words(searched, offset) else {
            continue;
        };
        if MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0 {
            return Some(read(searched, offset, flags));
        }
        broken = Some(problem("the checksum of its header is wrong"));
    }
    broken.map(Err)
}

fn read(searched: &[u8], offset: usize, flags: u32) -> Result<Header, KernelProblem> {
    let unknown = flags & REQUIREMENTS & !KNOWN;
    if unknown != 0 {
        return Err(problem(format!(
            "it requires what is not known here (header flags {unknown:#x})"
        )));
    }
    let addresses = if flags & FLAG_ADDRESSES == 0 {
        None
    } else {
        let Some(fields) = words(searched, offset + ADDRESSES) else {
            return Err(problem("its header does not end in the first 8192 bytes"));
        };
        let [header, load, load_end, bss_end, entry] = fields;
        Some(Addresses {
            header,
            load,
            load_end,
            bss_end,
            entry,
        })
    };
    Ok(Header {
        offset,
        video: flags & FLAG_VIDEO != 0,
        addresses,
    })
}

/// Little-endian words at `offset`, if there are as many.
fn words<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u32; N]> {
    let bytes = bytes.get(offset..)?.get(..N * 4)?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}

/// Why a Multiboot kernel is refused.
pub(super) fn problem(text: impl Into<String>) -> KernelProblem {
    KernelProblem::Multiboot(text.into())
}
