//! User-space probes by `uprobe_multi` links (Linux 6.6), or by perf events where there are none (`perf.rs`). aya 0.14
//! knows the former neither when it loads a program nor when it attaches one, and gives the latter no cookies for a
//! program of several places, so that both are done here: aya-obj reads and relocates, two bpf(2) calls do the rest.
//!
//! One `uprobe_multi` link holds all probes of a file: it is attached and detached at once. Both are detached by the
//! kernel when the agent ends in any way.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use anyhow::Context as _;

use super::perf;

/// `BPF_PROG_LOAD`, `BPF_BTF_LOAD`, `BPF_LINK_CREATE` of bpf(2).
const PROG_LOAD: libc::c_long = 5;
const BTF_LOAD: libc::c_long = 18;
pub const LINK_CREATE: libc::c_long = 28;
/// `BPF_PROG_TYPE_KPROBE`: what uprobes are, too.
const PROG_TYPE: u32 = 2;
/// `BPF_TRACE_UPROBE_MULTI`.
const UPROBE_MULTI: u32 = 48;
/// `BPF_F_UPROBE_MULTI_RETURN`.
const RETURN: u32 = 1;
/// Bytes for the verifier's words when it refuses a program.
const LOG_BYTES: usize = 4 << 20;

/// One place in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Offset in the file.
    pub offset: u64,
    /// What the program gets to know about it.
    pub cookie: u64,
}

/// How a kernel takes probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `uprobe_multi` links.
    Multi,
    /// Events of perf.
    Perf,
}

/// A loaded program.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    way: Way,
}

impl Program {
    /// A second descriptor of it, to ask what it costs.
    ///
    /// # Errors
    /// The system's, when there are no more descriptors.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

/// Probes that are attached while this lives.
#[derive(Debug)]
pub struct Link {
    _fds: Vec<OwnedFd>,
}

/// Loads a program that does nothing: what a probe costs by itself.
///
/// # Errors
/// The kernel's.
pub fn empty(way: Way) -> io::Result<Program> {
    // r0 = 0; exit.
    const INSTRUCTIONS: [u64; 2] = [0xb7, 0x95];
    let mut attributes = LoadAttributes {
        kind: PROG_TYPE,
        instructions_len: 2,
        instructions: INSTRUCTIONS.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        attach_type: way.attach_type(),
        ..LoadAttributes::default()
    };
    call(PROG_LOAD, &mut attributes).map(|fd| Program { fd, way })
}

impl Way {
    const fn attach_type(self) -> u32 {
        match self {
            Self::Multi => UPROBE_MULTI,
            Self::Perf => 0,
        }
    }
}

/// What a kernel before 6.6 lacks.
pub const NO_MULTI: &str = "this kernel has no uprobe_multi (Linux 6.6 and later have it)";

/// Does this kernel have such probes, and may this process attach them? Tried out, on a function of the agent's own.
///
/// # Errors
/// What stands in the way, and where it does not.
pub fn offered() -> Result<Way, String> {
    let own = || {
        let file = File::open("/proc/self/exe")?;
        let offset = offset_of(target as extern "C" fn() as usize as u64)
            .ok_or_else(|| io::Error::other("the agent does not find its own code"))?;
        io::Result::Ok((file, Place { offset, cookie: 0 }))
    };
    let (file, place) = own().map_err(|e| e.to_string())?;
    let tried = |way| {
        let program = empty(way).map_err(|e| (format!("the kernel refused an empty program: {e}"), None))?;
        match attach(&program, &file, &[place], false) {
            Ok(_) => Ok(()),
            Err(e) => Err((format!("the kernel refused a probe: {e}"), e.raw_os_error())),
        }
    };
    match tried(Way::Multi) {
        Ok(()) => Ok(Way::Multi),
        Err((_, Some(libc::EINVAL))) => match tried(Way::Perf) {
            Ok(()) => Ok(Way::Perf),
            Err((_, Some(libc::EACCES | libc::EPERM))) => {
                Err(format!("{NO_MULTI}, and its older uprobes ask for CAP_SYS_ADMIN, which this process lacks"))
            }
            Err((_, Some(libc::ENOENT))) => {
                Err(format!("{NO_MULTI}, and no older uprobes (CONFIG_UPROBE_EVENTS) either"))
            }
            Err((why, _)) => Err(format!("{NO_MULTI}, and its older uprobes do not work: {why}")),
        },
        Err((why, _)) => Err(why),
    }
}

/// A function to probe.
#[inline(never)]
pub extern "C" fn target() {
    std::hint::black_box(());
}

/// Where an address of this process is in its file.
#[must_use]
pub fn offset_of(address: u64) -> Option<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        // address perms offset dev inode path
        let mut fields = line.split(' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        (start..end).contains(&address).then(|| address - start + offset)
    })
}

/// Loads `names` from `object`; `maps` are the descriptors of the maps that aya made of the same object.
///
/// # Errors
/// The object lacks a program or map, or the kernel refuses a program: the verifier's last words.
pub fn load<const N: usize>(
    object: &[u8],
    names: [&'static str; N],
    maps: &HashMap<String, RawFd>,
    way: Way,
) -> anyhow::Result<[Program; N]> {
    let mut object = aya_obj::Object::parse(object).context("failed to read the eBPF object")?;
    // Programs with callbacks must name their functions' types.
    let known = aya::features().btf().context("this kernel takes no types of eBPF programs")?;
    let types = match object.fixup_and_sanitize_btf(known) {
        Ok(Some(types)) => load_types(&types.to_bytes()).context("the kernel refused the eBPF object's types")?,
        Ok(None) => anyhow::bail!("the eBPF object has no types"),
        Err(e) => return Err(e).context("failed to read the eBPF object's types"),
    };
    let text = object.functions.keys().map(|(section, _)| *section).collect();
    let known = std::mem::take(&mut object.maps);
    object
        .relocate_maps(known.iter().filter_map(|(name, map)| Some((name.as_str(), *maps.get(name)?, map))), &text)
        .context("failed to relocate the eBPF object")?;
    object.relocate_calls(&text).context("failed to relocate the eBPF object")?;
    let mut loaded = Vec::with_capacity(N);
    for name in names {
        let program = object.programs.get(name).with_context(|| format!("the eBPF object has no program {name}"))?;
        let function = object
            .functions
            .get(&program.function_key())
            .with_context(|| format!("the eBPF object has no code for {name}"))?;
        let fd = load_one(name, function, &types, &object.license, way)
            .map_err(|e| anyhow::anyhow!("the kernel refused the program {name}: {e}"))?;
        loaded.push(Program { fd, way });
    }
    loaded.try_into().ok().context("unreachable: as many programs as names")
}

/// Start of `union bpf_attr` for `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    instructions_len: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    types: u32,
    function_size: u32,
    functions: u64,
    functions_len: u32,
    line_size: u32,
    lines: u64,
    lines_len: u32,
    pad: u32,
}

/// `union bpf_attr` for `BPF_BTF_LOAD`.
#[repr(C)]
#[derive(Default)]
struct TypesAttributes {
    types: u64,
    log: u64,
    len: u32,
    log_len: u32,
    log_level: u32,
    pad: u32,
}

fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let len = u32::try_from(types.len()).map_err(io::Error::other)?;
    call(BTF_LOAD, &mut TypesAttributes { types: types.as_ptr() as u64, len, ..TypesAttributes::default() })
}

fn load_one(
    name: &str,
    function: &aya_obj::Function,
    types: &OwnedFd,
    license: &std::ffi::CStr,
    way: Way,
) -> Result<OwnedFd, String> {
    let instructions = &function.instructions;
    let functions = function.func_info.func_info_bytes();
    let lines = function.line_info.line_info_bytes();
    let size = |n: usize| u32::try_from(n).map_err(|e| e.to_string());
    let mut attributes = LoadAttributes {
        kind: PROG_TYPE,
        instructions_len: size(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        types: u32::try_from(types.as_raw_fd()).map_err(|e| e.to_string())?,
        function_size: size(function.func_info_rec_size)?,
        functions: functions.as_ptr() as u64,
        functions_len: size(function.func_info.len())?,
        line_size: size(function.line_info_rec_size)?,
        lines: lines.as_ptr() as u64,
        lines_len: size(function.line_info.len())?,
        license: license.as_ptr() as u64,
        attach_type: way.attach_type(),
        ..LoadAttributes::default()
    };
    for (to, from) in attributes.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    match call(PROG_LOAD, &mut attributes) {
        Ok(fd) => Ok(fd),
        Err(error) => {
            // Once more, to be told why. The log costs time, so that it is asked for only now.
            let mut log = vec![0u8; LOG_BYTES];
            attributes.log_level = 1;
            attributes.log_size = u32::try_from(LOG_BYTES).unwrap_or(u32::MAX);
            attributes.log = log.as_mut_ptr() as u64;
            if let Ok(fd) = call(PROG_LOAD, &mut attributes) {
                return Ok(fd);
            }
            let text = String::from_utf8_lossy(&log[..memchr::memchr(0, &log).unwrap_or(log.len())]);
            log::debug!("verifier: {text}");
            let tail: Vec<&str> = text.lines().rev().take(12).collect();
            Err(format!("{error}\n  {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n  ")))
        }
    }
}

/// Start of `union bpf_attr` for `BPF_LINK_CREATE` of a `uprobe_multi` link.
#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    reference_counters: u64,
    cookies: u64,
    len: u32,
    multi_flags: u32,
    pid: u32,
    pad: u32,
}

/// Attaches `program` at `places` of `file`: at their returns with `at_return`.
///
/// # Errors
/// The kernel's: `EINVAL` where it has no such links (before 6.6) or an offset is no instruction,
/// `EPERM` without the capabilities.
pub fn attach(program: &Program, file: &File, places: &[Place], at_return: bool) -> io::Result<Link> {
    if program.way == Way::Perf {
        return perf::attach(&program.fd, file, places, at_return).map(|fds| Link { _fds: fds });
    }
    // The name of a descriptor: reaches files of other mount namespaces, deleted ones, odd names.
    let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
    let offsets: Vec<u64> = places.iter().map(|p| p.offset).collect();
    let cookies: Vec<u64> = places.iter().map(|p| p.cookie).collect();
    let mut attributes = LinkAttributes {
        program: u32::try_from(program.fd.as_raw_fd()).unwrap_or(u32::MAX),
        attach_type: UPROBE_MULTI,
        path: path.as_ptr() as u64,
        offsets: offsets.as_ptr() as u64,
        cookies: cookies.as_ptr() as u64,
        len: u32::try_from(places.len()).unwrap_or(u32::MAX),
        multi_flags: if at_return { RETURN } else { 0 },
        ..LinkAttributes::default()
    };
    call(LINK_CREATE, &mut attributes).map(|fd| Link { _fds: vec![fd] })
}

/// bpf(2) with a command that returns a descriptor.
///
/// # Errors
/// The kernel's.
pub fn call<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the struct is as long as is said, and what it points to lives until the end of the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), std::mem::size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
