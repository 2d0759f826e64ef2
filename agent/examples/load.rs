//! Loads the programs and prints counters: for developing the kernel side.
fn main() -> anyhow::Result<()> {
    env_logger::init();
    let (kernel, _ring) = apiscope::probe::load::Kernel::start(apiscope::probe::load::Wanted { server: true, client: true, ring_bytes: 8 << 20 })?;
    for _ in 0..30 {
        std::thread::sleep(std::time::Duration::from_secs(1));
        println!("{:?} {:?}", kernel.counts(), kernel.costs());
    }
    Ok(())
}
