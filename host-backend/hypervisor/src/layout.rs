//! Where the guest's physical memory is in QEMU's RAM blocks. They are not the same: above the PCI hole
//! an address of the guest is larger than its offset in `pc.ram`, by an amount that depends on the
//! machine type and on the size of memory. So QEMU is asked.

use super::{Error, Qmp, Result};
use transhume_machine::memory_layout::Region;

/// Regions that a layout may have; a plain machine has some ten.
const MAX_REGIONS: usize = 4096;

/// The guest's physical memory, sorted by address and without overlaps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
}

impl Layout {
    /// Asks a QEMU. The first MiB changes while the firmware runs; the rest stays.
    ///
    /// # Errors
    /// Those of [`Qmp::execute`], and [`Error::Protocol`] if the answer makes no sense.
    pub async fn read(qmp: &Qmp) -> Result<Self> {
        Self::parse(&qmp.hmp("info mtree -f").await?)
    }

    /// Reads the output of `info mtree -f`.
    ///
    /// # Errors
    /// [`Error::Protocol`] if there is no view of the system's memory, or a senseless one.
    pub fn parse(text: &str) -> Result<Self> {
        let mut regions: Vec<Region> = Vec::new();
        for line in
            system_view(text).ok_or_else(|| wrong("it shows no address space \"memory\""))?
        {
            let Some(region) = parse_region(line)? else {
                continue;
            };
            if let Some(last) = regions.last_mut() {
                let end = last.start + last.length;
                if region.start < end {
                    return Err(wrong(format!("regions overlap at {:#x}", region.start)));
                }
                // What the firmware write-protects is still the same block.
                if region.start == end
                    && region.block == last.block
                    && last.offset.checked_add(last.length) == Some(region.offset)
                {
                    last.length += region.length;
                    continue;
                }
            }
            if regions.len() == MAX_REGIONS {
                return Err(wrong(format!("it shows more than {MAX_REGIONS} regions")));
            }
            regions.push(region);
        }
        Ok(Self { regions })
    }

    /// All regions, sorted by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region that holds a guest-physical address.
    pub fn find(&self, address: u64) -> Option<&Region> {
        let after = self
            .regions
            .partition_point(|region| region.start <= address);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (address - region.start < region.length).then_some(region)
    }
}

fn wrong(cause: impl std::fmt::Display) -> Error {
    Error::Protocol(format!("info mtree -f: {cause}"))
}

/// The lines of the flat view that the address space "memory" is rendered by.
fn system_view(text: &str) -> Option<impl Iterator<Item = &str>> {
    let views = text.split("FlatView #").skip(1);
    let is_address_space = |line: &str| line.trim_start().starts_with("AS \"memory\",");
    let view = views
        .into_iter()
        .find(|view| view.lines().any(is_address_space))?;
    Some(view.lines())
}

/// A line such as `0000000100000000-000000017fffffff (prio 0, ram): pc.ram @00000000c0000000`; `None` if
/// it is not about memory.
fn parse_region(line: &str) -> Result<Option<Region>> {
    let Some((range, rest)) = line.trim().split_once(" (prio ") else {
        return Ok(None);
    };
    let Some((kind, name)) = rest.split_once("): ") else {
        return Ok(None);
    };
    let kind = kind.rsplit(' ').next().unwrap_or_default();
    if !matches!(kind.strip_prefix("nv-").unwrap_or(kind), "ram" | "rom") {
        return Ok(None);
    }
    let nonsense = || wrong(format!("cannot read the line {:?}", line.trim()));
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, last) = range.split_once('-').ok_or_else(nonsense)?;
    let (start, last) = number(start).zip(number(last)).ok_or_else(nonsense)?;
    let length = last
        .checked_sub(start)
        .and_then(|length| length.checked_add(1));
    let length = length.filter(|length| start.checked_add(*length).is_some());
    // With KVM, QEMU adds its name to what KVM maps.
    let name = name.strip_suffix(" KVM").unwrap_or(name);
    let (block, offset) = match name.rsplit_once(" @") {
        Some((block, offset)) => (block, number(offset).ok_or_else(nonsense)?),
        None => (name, 0),
    };
    Ok(Some(Region {
        start,
        length: length.ok_or_else(nonsense)?,
        block: block.to_owned(),
        offset,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(text: &str) -> Vec<(u64, u64, String, u64)> {
        let layout = Layout::parse(text).expect("a layout");
        let regions = layout.regions().iter();
        regions
            .map(|one| (one.start, one.length, one.block.clone(), one.offset))
            .collect()
    }

    /// What every captured machine (with a screen, after its firmware ran) has around `high`.
    fn machine(low_end: u64, vram: u64, high: u64) -> Vec<(u64, u64, String, u64)> {
        let mut expected = vec![
            (0, 0xa_0000, "pc.ram".to_owned(), 0),
            (0xc_0000, low_end - 0xc_0000, "pc.ram".to_owned(), 0xc_0000),
            (vram, 0x100_0000, "vga.vram".to_owned(), 0),
            (0xfffc_0000, 0x4_0000, "pc.bios".to_owned(), 0),
        ];
        if high > 0 {
            expected.push((1 << 32, high, "pc.ram".to_owned(), low_end));
        }
        expected
    }

    #[test]
    fn reads_what_real_machines_say() {
        const GIB: u64 = 1 << 30;
        let small = machine(GIB, 0xfd00_0000, 0);
        let pc = machine(3 * GIB, 0xfd00_0000, 2 * GIB);
        let q35 = machine(2 * GIB, 0xfd00_0000, 3 * GIB);
        for (text, expected) in [
            (include_str!("testdata/mtree-7.2-pc-1g.txt"), &small),
            (include_str!("testdata/mtree-7.2-q35-1g.txt"), &small),
            (include_str!("testdata/mtree-10.0-pc-1g.txt"), &small),
            (include_str!("testdata/mtree-10.0-q35-1g.txt"), &small),
            (include_str!("testdata/mtree-7.2-pc-5g.txt"), &pc),
            (include_str!("testdata/mtree-10.0-pc-5g.txt"), &pc),
            (include_str!("testdata/mtree-7.2-q35-5g.txt"), &q35),
            (include_str!("testdata/mtree-10.0-q35-5g.txt"), &q35),
        ] {
            assert_eq!(&layout(text), expected);
            assert_eq!(&layout(&text.replace('\n', "\r\n")), expected);
        }
    }

    #[test]
    fn finds_the_block_of_an_address() {
        let text = include_str!("testdata/mtree-10.0-q35-5g.txt");
        let layout = Layout::parse(text).expect("a layout");
        let offset = |address| {
            layout
                .find(address)
                .map(|one| address - one.start + one.offset)
        };
        assert_eq!(offset(0x1000), Some(0x1000));
        assert_eq!(offset(0xa_0000), None);
        assert_eq!(offset(0x7fff_ffff), Some(0x7fff_ffff));
        assert_eq!(offset(0x8000_0000), None);
        assert_eq!(offset(0x1_0000_0000), Some(0x8000_0000));
        assert_eq!(offset(0x1_bfff_ffff), Some(0x1_3fff_ffff));
        assert_eq!(offset(0x1_c000_0000), None);
        assert_eq!(offset(u64::MAX), None);
    }

    fn view(line: &str) -> String {
        format!("FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n{line}\n")
    }

    #[test]
    fn knows_kvms_mark_and_other_kinds_of_memory() {
        let ram =
            view("  0000000000000000-0000000000000fff (prio 0, ram): pc.ram @0000000000001000 KVM");
        assert_eq!(layout(&ram), [(0, 0x1000, "pc.ram".to_owned(), 0x1000)]);
        let ram = view("  0000000000000000-0000000000000fff (prio 0, nv-ram): mem KVM");
        assert_eq!(layout(&ram), [(0, 0x1000, "mem".to_owned(), 0)]);
        let device = view("  0000000000000000-0000000000000fff (prio 0, ramd): vfio BAR 0");
        assert!(layout(&device).is_empty());
    }

    #[test]
    fn refuses_nonsense() {
        for text in [
            String::new(),
            "FlatView #0\n AS \"I/O\", root: io\n".to_owned(),
            view("  0000000000001000-0000000000000fff (prio 0, ram): pc.ram\n")
                .replace("1000-", "2000-"),
            view("  0000000000000000-ffffffffffffffff (prio 0, ram): pc.ram"),
            view("  xyz-0000000000000fff (prio 0, ram): pc.ram"),
            view("  0000000000000000-0000000000000fff (prio 0, ram): pc.ram @zz"),
            view(
                "  0000000000000000-0000000000000fff (prio 0, ram): a\n  0000000000000800-0000000000000fff \
                 (prio 0, ram): b",
            ),
        ] {
            assert!(Layout::parse(&text).is_err(), "{text}");
        }
    }
}
