//! The host name and the first network card. The host says what DHCP would: asking costs time at
//! every boot.

use std::io;
use std::path::Path;

use rustix::system::sethostname;
use strata_protocol::{Network, Session};

use super::mounts::put;
use crate::sys;

const CARD: &str = "eth0";
const DEFAULT_NAME: &str = "strata";

/// Sets all of it up. What fails is said; the guest goes on.
pub(super) fn set_up(session: &Session) {
    let say = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            eprintln!("strata: {what}: {error}");
        }
    };
    let name = session.name.as_deref().unwrap_or(DEFAULT_NAME);
    say(
        "the host name",
        sethostname(name.as_bytes()).map_err(io::Error::from),
    );
    say("the loopback interface", sys::interface_up("lo"));
    if let Some(network) = &session.network
        && Path::new("/sys/class/net").join(CARD).exists()
    {
        say("the network", start(network));
    }
    let _ = std::fs::create_dir_all("/etc");
    say("/etc", write_files(session, Path::new("/")));
}

fn start(network: &Network) -> io::Result<()> {
    sys::set_address(CARD, network.address, network.bits)?;
    sys::interface_up(CARD)?;
    sys::set_default_route(network.gateway)
}

/// Tells the programs in `root` of the machine's name and network; their files may lead nowhere,
/// and are replaced where the machine knows better.
pub(super) fn write_files(session: &Session, root: &Path) -> io::Result<()> {
    let name = session.name.as_deref().unwrap_or(DEFAULT_NAME);
    let replace = |file: &str, text: &str, only_if_empty: bool| {
        let path = root.join("etc").join(file);
        if only_if_empty && std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0) {
            return Ok(());
        }
        let _ = std::fs::remove_file(&path);
        put(path, text)
    };
    let own = session.name.is_none();
    replace("hosts", &format!("127.0.0.1 localhost {name}\n"), own)?;
    replace("hostname", &format!("{name}\n"), own)?;
    if let Some(Network {
        gateway, domain, ..
    }) = &session.network
    {
        let text = format!("search {domain}\nnameserver {gateway}\n");
        replace("resolv.conf", &text, false)?;
    }
    Ok(())
}
