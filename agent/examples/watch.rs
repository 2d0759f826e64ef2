//! Writes every exchange as NDJSON: for developing the kernel side.
use std::{io::Write as _, sync::{Arc, atomic::{AtomicBool, Ordering}}};
use apiscope::{conn::{Connections, Identity, Outside}, exchange::{Exchange, Peer}, identity::{self, Processes}, probe::{load::{Kernel, Wanted}, ring::Reader}, stats::Stats};
struct Out { processes: Processes, buf: Vec<u8>, n: u64 }
impl Outside for Out {
    fn identify(&mut self, pid: u32, comm: &str, _: &Peer, _: &Peer) -> Identity {
        let p = self.processes.get(pid, comm);
        Identity { service: p.service, exe: p.exe, wanted: true }
    }
    fn exchange(&mut self, e: &Exchange) { self.n += 1; if !self.buf.is_empty() || self.buf.capacity() > 0 { e.write_json(e.path.as_deref(), &mut self.buf); } }
    fn is_gone(&mut self, pid: u32) -> bool { identity::is_gone(pid) }
}
static STOP: AtomicBool = AtomicBool::new(false);
extern "C" fn stop(_: i32) { STOP.store(true, Ordering::Relaxed) }
fn main() -> anyhow::Result<()> {
    env_logger::init();
    let (kernel, ring) = Kernel::start(Wanted { server: true, client: std::env::var("SIDE").is_err(), ring_bytes: 8 << 20 })?;
    unsafe { libc::signal(libc::SIGINT, stop as *const () as usize); libc::signal(libc::SIGTERM, stop as *const () as usize); }
    let mut file = std::env::args().nth(1).map(std::fs::File::create).transpose()?;
    let mut out = Out { processes: Processes::default(), buf: if file.is_some() { Vec::with_capacity(1 << 20) } else { Vec::new() }, n: 0 };
    let mut reader = Reader::new(ring);
    let stats = Arc::new(Stats::default());
    let mut conns = Connections::new(1, stats.clone());
    eprintln!("ready");
    let mut stopping = false; let mut records = 0;
    loop {
        let n = reader.drain(100_000, |r| match apiscope::event::parse(r) {
            Ok(e) => { if std::env::var("SHOW").is_ok() { eprintln!("{e:?}"); } conns.handle(e, &mut out) },
            Err(e) => eprintln!("{e}"),
        });
        records += n;
        if let Some(f) = &mut file { f.write_all(&out.buf)?; out.buf.clear(); }
        if n == 0 { if stopping { break; } if STOP.load(Ordering::Relaxed) { stopping = true; } reader.rest(); }
        let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
        conns.sweep(ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64, &mut out);
    }
    conns.flush(&mut out); if let Some(f) = &mut file { f.write_all(&out.buf)?; }
    eprintln!("exchanges {} records {records} conns {} {:?} {:?} {:?}", out.n, conns.len(), kernel.counts(), kernel.costs(), stats.totals());
    let s = std::fs::read_to_string("/proc/self/stat")?; let v: Vec<_> = s.split(' ').collect(); eprintln!("cpu ticks {} {}", v[13], v[14]);
    Ok(())
}
