//! `strata doctor`: what this host can do, and which accelerator would be used and why.
//!
//! `host` gathers facts; here they are judged and shown. Nothing is changed, and /dev/kvm is
//! only looked at from outside, never opened.

mod host;

use serde::Serialize;
use strata_image::{Cache, CacheState};
use strata_sandbox::Layer;

use crate::cli::OutputForm;
use crate::exit::End;
use crate::sandbox::Found;
use crate::units::display_size;
use host::{Host, KvmDevice};

/// Memory a default guest and Strata itself need, bytes.
const COMFORTABLE_MEMORY: u64 = 768 << 20;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Good,
    /// Something works less well, or only for some uses.
    Limited,
    /// Guests cannot run.
    Bad,
}

/// One finding.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    grade: Grade,
    detail: String,
}

/// The accelerator that `--accel auto` takes.
#[derive(Debug, Serialize)]
struct Choice {
    name: &'static str,
    reason: String,
}

/// The whole report.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    can_run_guests: bool,
    accelerator: Choice,
    findings: Vec<Finding>,
}

/// Examines the host and prints the report.
pub(crate) fn doctor(form: OutputForm) -> End {
    let report = Report::of(&Host::examine(), cache_finding());
    let text = match form {
        OutputForm::Text => report.text(),
        OutputForm::Json => report.json(),
    };
    match crate::print(text.as_bytes()) {
        End::Done if !report.can_run_guests => End::Unfit,
        end => end,
    }
}

impl Report {
    fn of(host: &Host, cache: Finding) -> Self {
        let mut findings = vec![processor(host)];
        findings.extend(instructions(host));
        findings.extend([kvm(&host.kvm), memory(host), memfd(host)]);
        findings.extend(sandbox(&host.sandbox));
        findings.extend([apt(host.apt.as_deref()), cache]);
        let can_run_guests = findings.iter().all(|finding| finding.grade < Grade::Bad);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            can_run_guests,
            accelerator: choice(&host.kvm),
            findings,
        }
    }

    fn text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for finding in &self.findings {
            let mark = match finding.grade {
                Grade::Good => "ok",
                Grade::Limited => "note",
                Grade::Bad => "FAIL",
            };
            let _ = writeln!(text, "{mark:<5} {:<19} {}", finding.subject, finding.detail);
        }
        let verdict = if self.can_run_guests {
            "This host can run guests."
        } else {
            "This host cannot run guests; see the lines marked FAIL."
        };
        let Choice { name, reason } = &self.accelerator;
        let _ = writeln!(text, "\n{verdict}\nAccelerator: {name}, because {reason}.");
        text
    }

    fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("plain data has a JSON form");
        text.push('\n');
        text
    }
}

fn choice(kvm: &KvmDevice) -> Choice {
    let reason = match kvm {
        KvmDevice::Absent => "there is no /dev/kvm, and the software CPU needs nothing of the host",
        KvmDevice::Forbidden | KvmDevice::Permitted => {
            "this version of Strata has no kvm accelerator yet, so /dev/kvm is not used"
        }
    };
    Choice {
        name: "soft",
        reason: reason.to_owned(),
    }
}

fn finding(subject: &'static str, grade: Grade, detail: impl Into<String>) -> Finding {
    Finding {
        subject,
        grade,
        detail: detail.into(),
    }
}

fn processor(host: &Host) -> Finding {
    let detail = format!(
        "{} ({}), {} usable CPU{}",
        host.model,
        host.vendor,
        host.cpus,
        if host.cpus == 1 { "" } else { "s" }
    );
    finding("processor", Grade::Good, detail)
}

/// The software CPU runs a guest's instructions as the host's own, so what the host lacks the
/// guest does without. Below x86-64-v2 Debian's user space does not run.
fn instructions(host: &Host) -> Vec<Finding> {
    host.instructions
        .iter()
        .map(|set| {
            if set.missing.is_empty() {
                return finding(set.name, Grade::Good, set.use_of);
            }
            let grade = if set.needed {
                Grade::Bad
            } else {
                Grade::Limited
            };
            let missing = set.missing.join(", ");
            let effect = if set.needed {
                "guests cannot run without"
            } else {
                "guests run all the same"
            };
            finding(
                set.name,
                grade,
                format!("the host lacks {missing}; {effect}"),
            )
        })
        .collect()
}

fn kvm(device: &KvmDevice) -> Finding {
    let (grade, detail) = match device {
        KvmDevice::Absent => (Grade::Good, "not there, and not needed"),
        KvmDevice::Forbidden => (Grade::Good, "there, not open to this user, and not needed"),
        KvmDevice::Permitted => (
            Grade::Good,
            "there, open to this user by its permissions; not opened or tried: the kvm \
             accelerator is not built yet",
        ),
    };
    finding("/dev/kvm", grade, detail)
}

fn memory(host: &Host) -> Finding {
    let Some(available) = host.memory_available else {
        return finding("memory", Grade::Limited, "/proc/meminfo cannot be read");
    };
    let limit = host.memory_limit.map_or_else(String::new, |limit| {
        format!(", limited to {} by this control group", display_size(limit))
    });
    let detail = format!("{} available{limit}", display_size(available));
    let least = available.min(host.memory_limit.unwrap_or(u64::MAX));
    if least < COMFORTABLE_MEMORY {
        let detail = format!("{detail}; a guest of 512M may not fit, see --memory");
        return finding("memory", Grade::Limited, detail);
    }
    finding("memory", Grade::Good, detail)
}

fn memfd(host: &Host) -> Finding {
    const SUBJECT: &str = "memfd";
    if let Err(error) = &host.memfd {
        return finding(SUBJECT, Grade::Bad, format!("cannot be created: {error}"));
    }
    match host.memfd_noexec {
        Some(2) => finding(
            SUBJECT,
            Grade::Bad,
            "executable ones are forbidden: sysctl vm.memfd_noexec is 2, it must be 0 or 1",
        ),
        _ => finding(SUBJECT, Grade::Good, "guest memory and translated code"),
    }
}

/// What holds a guest that breaks out of its machine. Machines run without, too.
fn sandbox(found: &Result<Vec<Found>, String>) -> Vec<Finding> {
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            let detail = format!("cannot be tried: {error}");
            return vec![finding("sandbox", Grade::Limited, detail)];
        }
    };
    let judge = |found: &Found| {
        let subject = match found.layer {
            Layer::Namespaces => "sandbox: namespaces",
            Layer::Privileges => "sandbox: privileges",
            Layer::Landlock => "sandbox: Landlock",
            Layer::Seccomp => "sandbox: seccomp",
        };
        match &found.state {
            Ok(detail) => finding(subject, Grade::Good, detail),
            Err(reason) => {
                let detail = format!("{reason}; machines run without this layer");
                finding(subject, Grade::Limited, detail)
            }
        }
    };
    found.iter().map(judge).collect()
}

fn apt(version: Option<&str>) -> Finding {
    match version {
        Some(version) => finding("apt", Grade::Good, version),
        None => finding(
            "apt",
            Grade::Limited,
            "not installed: the default appliance cannot be built; use --kernel and --initrd",
        ),
    }
}

fn cache_finding() -> Finding {
    const SUBJECT: &str = "default appliance";
    let cache = match Cache::of_user() {
        Ok(cache) => cache,
        Err(error) => return finding(SUBJECT, Grade::Limited, error.to_string()),
    };
    let place = cache.appliance_directory();
    let place = place.display();
    match cache.state() {
        CacheState::Absent => finding(
            SUBJECT,
            Grade::Good,
            format!("not built yet; the first 'strata run' builds it in {place}"),
        ),
        CacheState::Ready(manifest) => finding(
            SUBJECT,
            Grade::Good,
            format!("Linux {} in {place}", manifest.kernel_release),
        ),
        CacheState::Damaged(reason) => finding(
            SUBJECT,
            Grade::Limited,
            format!("damaged ({reason}), the next run builds it anew in {place}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::InstructionSet;

    fn good_host() -> Host {
        Host {
            vendor: "GenuineIntel".into(),
            model: "Some CPU".into(),
            cpus: 2,
            instructions: vec![set(true, &[]), set(false, &[])],
            kvm: KvmDevice::Absent,
            memory_available: Some(8 << 30),
            memory_limit: None,
            memfd: Ok(()),
            memfd_noexec: Some(0),
            sandbox: Ok(vec![layer(Ok("only what machines call".into()))]),
            apt: Some("apt 2.6.1".into()),
        }
    }

    fn layer(state: Result<String, String>) -> Found {
        Found {
            layer: Layer::Seccomp,
            state,
        }
    }

    fn set(needed: bool, missing: &[&'static str]) -> InstructionSet {
        InstructionSet {
            name: "x86-64-v2",
            use_of: "needed",
            needed,
            missing: missing.to_vec(),
        }
    }

    fn report(host: &Host) -> Report {
        Report::of(host, finding("default appliance", Grade::Good, "x"))
    }

    #[test]
    fn a_good_host_can_run_guests_with_the_software_cpu() {
        let report = report(&good_host());
        assert!(report.can_run_guests);
        assert_eq!(report.accelerator.name, "soft");
    }

    #[test]
    fn a_missing_needed_instruction_set_is_named_and_fatal() {
        let host = Host {
            instructions: vec![set(true, &["sse4.2"])],
            ..good_host()
        };
        let report = report(&host);
        assert!(!report.can_run_guests);
        assert!(report.text().contains("sse4.2"));
    }

    #[test]
    fn what_only_limits_is_not_fatal() {
        let host = Host {
            instructions: vec![set(false, &["avx2"])],
            memory_limit: Some(100 << 20),
            sandbox: Ok(vec![layer(Err("not built in".into()))]),
            apt: None,
            ..good_host()
        };
        assert!(report(&host).can_run_guests);
    }

    #[test]
    fn a_missing_layer_of_the_sandbox_is_noted_with_its_reason() {
        let host = Host {
            sandbox: Ok(vec![layer(Err("not built in".into()))]),
            ..good_host()
        };
        let text = report(&host).text();
        let line = text.lines().find(|line| line.contains("seccomp")).unwrap();
        assert!(
            line.starts_with("note") && line.contains("not built in"),
            "{line}"
        );
    }

    #[test]
    fn a_host_without_executable_memfds_cannot_run_guests() {
        let host = Host {
            memfd_noexec: Some(2),
            ..good_host()
        };
        assert!(!report(&host).can_run_guests);
    }

    #[test]
    fn kvm_is_reported_and_not_chosen() {
        let host = Host {
            kvm: KvmDevice::Permitted,
            ..good_host()
        };
        let report = report(&host);
        assert_eq!(report.accelerator.name, "soft");
        assert!(report.text().contains("not built yet"));
    }

    #[test]
    fn the_json_form_has_the_choice_and_every_finding() {
        let report = report(&good_host());
        let value: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(value["accelerator"]["name"], "soft");
        assert_eq!(value["can_run_guests"], true);
        assert_eq!(
            value["findings"].as_array().unwrap().len(),
            report.findings.len()
        );
        assert_eq!(value["findings"][0]["grade"], "good");
    }
}
