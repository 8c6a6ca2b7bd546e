//! What `strata disk` tells of images, for people and for programs.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::HumanBytes;
use serde_json::{Value, json};
use strata_disk::qcow2::{self, Compression, Repair, Report};
use strata_disk::{ExtentKind, Format, Key};

use super::args::{LookArgs, Mend};
use super::{Result, qcow2_alone, with};
use crate::cli::OutputForm;
use crate::exit::End;
use crate::streams::Stream;

fn print(text: &str) {
    let _ = Stream::Stdout.write(text.as_bytes());
}

fn print_json(value: &Value) {
    print(&format!("{value:#}\n"));
}

/// Bytes of the host that a file takes.
fn room(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(with(path, fs::metadata(path))?.blocks() * 512)
}

pub(super) fn info(args: &LookArgs) -> Result<()> {
    let opened = strata_disk::open_file(&args.path, args.format, false)?;
    let (format, references) = (opened.format, opened.references.clone());
    let backing = opened.backing()?;
    drop(opened);
    let facts = (format == Format::Qcow2)
        .then(|| strata_disk::open_file(&args.path, Some(format), false))
        .transpose()?
        .map(|opened| with(&args.path, qcow2::facts(&opened.file)))
        .transpose()?;
    let size = match &facts {
        Some(facts) => facts.size,
        None => strata_disk::open(&args.path, Some(format), false)?.size(),
    };
    let room = room(&args.path)?;
    if args.output == OutputForm::Json {
        print_json(&json!({
            "path": args.path,
            "format": format.name(),
            "size": size,
            "host_bytes": room,
            "backing": backing.map(|(path, _)| path),
            "backing_format": references.backing_format,
            "data_file": references.data_file,
            "qcow2": facts.map(|facts| json!({
                "version": facts.version,
                "cluster_size": facts.cluster_size,
                "compression": compression_name(facts.compression),
                "extended_l2": facts.extended_l2,
                "lazy_refcounts": facts.lazy_refcounts,
                "refcount_bits": facts.refcount_bits,
                "dirty": facts.dirty,
                "corrupt": facts.corrupt,
                "snapshots": facts.snapshots,
                "encryption": facts.encryption,
            })),
        }));
        return Ok(());
    }
    let mut lines = vec![
        format!("image      {}", args.path.display()),
        format!("format     {}", format.name()),
        format!("size       {} ({size} bytes)", HumanBytes(size)),
        format!("on host    {}", HumanBytes(room)),
    ];
    if let Some((path, _)) = backing {
        lines.push(format!("based on   {}", path.display()));
    }
    if let Some(name) = references.data_file {
        lines.push(format!("data in    {name}"));
    }
    if let Some(facts) = facts {
        let mut words = vec![
            format!("version {}", facts.version),
            format!("clusters of {}", HumanBytes(facts.cluster_size)),
            compression_name(facts.compression).to_owned(),
        ];
        let flags = [
            (facts.extended_l2, "subclusters"),
            (facts.lazy_refcounts, "lazy refcounts"),
            (facts.dirty, "dirty"),
            (facts.corrupt, "corrupt"),
        ];
        words.extend(flags.iter().filter(|f| f.0).map(|f| f.1.to_owned()));
        lines.push(format!("qcow2      {}", words.join(", ")));
        lines.push(format!("snapshots  {}", facts.snapshots));
        if let Some(encryption) = facts.encryption {
            lines.push(format!("encrypted  {encryption}"));
        }
    }
    print(&(lines.join("\n") + "\n"));
    Ok(())
}

fn compression_name(compression: Compression) -> &'static str {
    match compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    }
}

pub(super) fn check(args: &LookArgs, repair: Option<Mend>) -> Result<End> {
    let mut image = qcow2_alone(&args.path, args.format, repair.is_some())?;
    let how = match repair {
        None => Repair::Nothing,
        Some(Mend::Leaks) => Repair::Leaks,
        Some(Mend::All) => Repair::References,
    };
    let report = with(&args.path, image.check(how))?;
    tell_check(args, &report);
    Ok(match (&report, report.is_clean()) {
        (_, true) => End::Done,
        (report, _) if report.damages > 0 => End::DiskDamaged,
        _ => End::DiskLeaks,
    })
}

fn tell_check(args: &LookArgs, report: &Report) {
    if args.output == OutputForm::Json {
        print_json(&json!({
            "path": args.path,
            "damages": report.damages,
            "leaks": report.leaks,
            "repaired": report.repaired,
            "clusters": report.clusters,
            "allocated_clusters": report.allocated,
            "compressed_clusters": report.compressed,
            "end": report.end,
            "findings": report.findings,
        }));
        return;
    }
    for finding in &report.findings {
        print(&format!("{finding}\n"));
    }
    let what = match (report.damages, report.leaks) {
        (0, 0) => "nothing is wrong".to_owned(),
        (damages, leaks) => format!(
            "{damages} damaged, {leaks} leaked, {} of them mended",
            report.repaired
        ),
    };
    let (allocated, clusters) = (report.allocated, report.clusters);
    print(&format!(
        "{what}; {allocated} of {clusters} clusters are in the image\n"
    ));
}

pub(super) fn map(args: &LookArgs) -> Result<()> {
    let disk = strata_disk::open_with(&args.path, args.format, false, Key::NotNeeded)?;
    let mut at = 0;
    let mut entries = Vec::new();
    while at < disk.size() {
        let extent = with(&args.path, disk.extent(at, disk.size() - at))?;
        let (kind, host) = match extent.kind {
            ExtentKind::Data(host) => ("data", Some(host)),
            ExtentKind::Compressed => ("compressed", None),
            ExtentKind::Zero => ("zero", None),
            ExtentKind::Absent => ("absent", None),
        };
        entries.push((at, extent.length, extent.depth, kind, host));
        at += extent.length;
    }
    if args.output == OutputForm::Json {
        let values = entries.iter().map(|(start, length, depth, kind, host)| {
            json!({
                "start": start, "length": length, "depth": depth, "kind": kind,
                "host_offset": host,
            })
        });
        print_json(&values.collect());
        return Ok(());
    }
    let heads = ("START", "LENGTH", "DEPTH", "KIND", "HOST OFFSET");
    let mut lines = vec![format!(
        "{:>16} {:>16} {:>5} {:<10} {}",
        heads.0, heads.1, heads.2, heads.3, heads.4
    )];
    for (start, length, depth, kind, host) in entries {
        let host = host.map_or(String::new(), |host| format!("{host:#x}"));
        lines.push(format!(
            "{start:>#16x} {length:>#16x} {depth:>5} {kind:<10} {host}"
        ));
    }
    print(&(lines.join("\n") + "\n"));
    Ok(())
}

pub(super) fn list_snapshots(args: &LookArgs) -> Result<()> {
    let image = qcow2_alone(&args.path, args.format, false)?;
    let all = with(&args.path, image.snapshots())?;
    let seconds = |time: SystemTime| {
        let since = time.duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    };
    if args.output == OutputForm::Json {
        let values = all.iter().map(|s| {
            json!({
                "id": s.id, "name": s.name, "time": seconds(s.time), "size": s.size,
                "machine_state_bytes": s.machine_state,
            })
        });
        print_json(&values.collect());
        return Ok(());
    }
    let heads = ("ID", "NAME", "DISK", "UNIX TIME");
    let mut lines = vec![format!(
        "{:<6} {:<24} {:>12} {:>12}",
        heads.0, heads.1, heads.2, heads.3
    )];
    for s in all {
        let size = HumanBytes(s.size).to_string();
        lines.push(format!(
            "{:<6} {:<24} {size:>12} {:>12}",
            s.id,
            s.name,
            seconds(s.time)
        ));
    }
    print(&(lines.join("\n") + "\n"));
    Ok(())
}
