//! Kernel modules: which are needed, what they depend on, and the index `modprobe` reads.
//!
//! Debian's packages have no `modules.dep` (depmod makes it at installation), so the
//! dependencies are read from the modules themselves: the `depends=` field of the ELF
//! section `.modinfo`. Called by `appliance`; pure, no files.

use std::collections::{BTreeMap, BTreeSet};

use object::{Object, ObjectSection};

/// A module, decompressed.
#[derive(Debug, Clone)]
pub(crate) struct Module {
    /// File name as shipped, such as `virtio-rng.ko`.
    pub(crate) file: String,
    /// Contents of the file, signature included.
    pub(crate) data: Vec<u8>,
    /// Names of the modules it needs, normalised.
    pub(crate) depends: Vec<String>,
}

/// Modules found so far, by normalised name.
pub(crate) type Set = BTreeMap<String, Module>;

/// The name the kernel uses: without suffixes, `-` as `_`.
pub(crate) fn normalise(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let name = name.split(".ko").next().unwrap_or(name);
    name.replace('-', "_")
}

/// Reads a module's `depends=` field.
pub(crate) fn parse(file: &str, data: Vec<u8>) -> Result<Module, String> {
    let elf = object::File::parse(&*data).map_err(|e| format!("module '{file}': {e}"))?;
    let info = elf
        .section_by_name(".modinfo")
        .ok_or_else(|| format!("module '{file}' has no .modinfo section"))?;
    let info = info.data().map_err(|e| format!("module '{file}': {e}"))?;
    let depends = info
        .split(|byte| *byte == 0)
        .find_map(|field| field.strip_prefix(b"depends="))
        .map(|list| String::from_utf8_lossy(list).into_owned())
        .unwrap_or_default();
    Ok(Module {
        file: file.to_owned(),
        depends: depends
            .split(',')
            .filter(|name| !name.is_empty())
            .map(normalise)
            .collect(),
        data,
    })
}

/// Names that modules in `set` depend on and that are neither in it nor `builtin`.
pub(crate) fn missing(set: &Set, builtin: &BTreeSet<String>) -> BTreeSet<String> {
    set.values()
        .flat_map(|module| &module.depends)
        .filter(|name| !set.contains_key(*name) && !builtin.contains(*name))
        .cloned()
        .collect()
}

/// All that must be loaded before and including `name`, in load order.
pub(crate) fn load_order(set: &Set, name: &str) -> Vec<String> {
    fn visit(set: &Set, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<String>) {
        let Some(module) = set.get(name) else { return };
        if !seen.insert(name.to_owned()) {
            return;
        }
        for need in &module.depends {
            visit(set, need, seen, order);
        }
        order.push(name.to_owned());
    }
    let mut order = Vec::new();
    visit(set, name, &mut BTreeSet::new(), &mut order);
    order
}

/// The text of `modules.dep`: per module its needs, the one to load first coming last.
pub(crate) fn dependency_index(set: &Set) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for (name, module) in set {
        let _ = write!(text, "{}:", module.file);
        for need in load_order(set, name).iter().rev().skip(1) {
            let _ = write!(text, " {}", set[need].file);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest ELF file that has a `.modinfo` section with the given text.
    pub(crate) fn module_file(info: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let info_at = 64;
        let names_at = info_at + info.len();
        let sections_at = (names_at + names.len()).next_multiple_of(8);
        let mut elf = vec![0; sections_at];
        elf[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        elf[16..18].copy_from_slice(&1_u16.to_le_bytes()); // e_type: relocatable
        elf[18..20].copy_from_slice(&62_u16.to_le_bytes()); // e_machine: x86-64
        elf[20..24].copy_from_slice(&1_u32.to_le_bytes());
        elf[40..48].copy_from_slice(&(sections_at as u64).to_le_bytes());
        elf[52..54].copy_from_slice(&64_u16.to_le_bytes());
        elf[58..60].copy_from_slice(&64_u16.to_le_bytes());
        elf[60..62].copy_from_slice(&3_u16.to_le_bytes()); // e_shnum
        elf[62..64].copy_from_slice(&2_u16.to_le_bytes()); // e_shstrndx
        elf[info_at..names_at].copy_from_slice(info.as_bytes());
        elf[names_at..names_at + names.len()].copy_from_slice(names);
        let sections = [
            (0, 0, 0, 0),
            (1, 1, info_at, info.len()),
            (10, 3, names_at, names.len()),
        ];
        for (name, kind, offset, size) in sections {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&(name as u32).to_le_bytes());
            header[4..8].copy_from_slice(&(kind as u32).to_le_bytes());
            header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            header[48..56].copy_from_slice(&1_u64.to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf
    }

    fn set(modules: &[(&str, &str)]) -> Set {
        modules
            .iter()
            .map(|(file, depends)| {
                let data = module_file(&format!("license=GPL\0depends={depends}\0name=x\0"));
                (normalise(file), parse(file, data).unwrap())
            })
            .collect()
    }

    #[test]
    fn dependencies_come_from_modinfo_with_names_normalised() {
        let module = parse("a.ko", module_file("x=y\0depends=virtio-ring,virtio\0")).unwrap();
        assert_eq!(module.depends, ["virtio_ring", "virtio"]);
    }

    #[test]
    fn a_module_without_dependencies_has_none() {
        let module = parse("a.ko", module_file("license=GPL\0depends=\0")).unwrap();
        assert!(module.depends.is_empty());
    }

    #[test]
    fn a_file_that_is_no_module_is_refused_by_name() {
        assert!(
            parse("bad.ko", b"garbage".to_vec())
                .unwrap_err()
                .contains("bad.ko")
        );
    }

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let set = set(&[
            ("virtio.ko", "virtio_ring"),
            ("virtio_ring.ko", ""),
            ("virtio-rng.ko", "virtio,virtio_ring"),
        ]);
        assert_eq!(
            load_order(&set, "virtio_rng"),
            ["virtio_ring", "virtio", "virtio_rng"]
        );
        assert!(
            dependency_index(&set)
                .lines()
                .any(|line| line == "virtio-rng.ko: virtio.ko virtio_ring.ko")
        );
    }

    #[test]
    fn modules_that_need_each_other_do_not_hang_the_build() {
        let set = set(&[("a.ko", "b"), ("b.ko", "a")]);
        assert_eq!(load_order(&set, "a"), ["b", "a"]);
    }

    #[test]
    fn a_dependency_built_into_the_kernel_is_not_missing() {
        let set = set(&[("a.ko", "rng_core,failover")]);
        let builtin = BTreeSet::from(["rng_core".to_owned()]);
        assert_eq!(
            missing(&set, &builtin),
            BTreeSet::from(["failover".to_owned()])
        );
    }
}
