//! Takes the DWARF out of a built eBPF object.
//!
//! The linker needs debug information to make BTF of it and then leaves both in. Nothing reads the DWARF
//! afterwards (the kernel's log quotes source lines from BTF), and it is four fifths of a file that is
//! kept in the tree.

use anyhow::{Result, anyhow};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

/// The object without its `.debug_*` sections and their relocations.
///
/// # Errors
/// It is not an ELF object.
pub fn without_dwarf(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).map_err(|e| anyhow!("the linker's output is not ELF: {e}"))?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete |= [&b".debug_"[..], b".rel.debug_"].iter().any(|prefix| name.starts_with(prefix));
    }
    // LLVM keeps the names of sections and of symbols in one table, this writer in two.
    if !builder.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = builder.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    builder.write(&mut stripped).map_err(|e| anyhow!("failed to write the object: {e}"))?;
    Ok(stripped)
}
