//! Measured times as a table or as JSON, with the ratios that count.

use std::fmt;

use serde::Serialize;

use super::disk::Disk;
use super::guests::Slept;
use super::net::Net;
use super::parts::SLEEP;

/// One line: medians in seconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) native: Option<f64>,
    pub(crate) strata: Option<f64>,
    pub(crate) tcg: Option<f64>,
}

impl Row {
    /// How many times faster than TCG Strata is.
    fn tcg_by_strata(&self) -> Option<f64> {
        Some(self.tcg? / self.strata?)
    }

    /// How many times slower than the host itself Strata is.
    fn strata_by_native(&self) -> Option<f64> {
        Some(self.strata? / self.native?)
    }
}

/// All that was measured; what was not is absent.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) boot: Option<Row>,
    pub(crate) rows: Vec<Row>,
    /// Host memory that a booted machine of Strata's held beyond the guest's own, in KiB.
    pub(crate) held: Option<u64>,
    /// A load for two CPUs, on one and on two.
    pub(crate) parallel: Option<[Row; 2]>,
    pub(crate) slept: Option<Slept>,
    pub(crate) net: Option<Net>,
    pub(crate) disk: Option<Disk>,
}

#[derive(Serialize)]
struct WithRatios<'a> {
    #[serde(flatten)]
    row: &'a Row,
    tcg_by_strata: Option<f64>,
    strata_by_native: Option<f64>,
}

impl<'a> From<&'a Row> for WithRatios<'a> {
    fn from(row: &'a Row) -> Self {
        Self {
            row,
            tcg_by_strata: row.tcg_by_strata(),
            strata_by_native: row.strata_by_native(),
        }
    }
}

impl Report {
    pub(crate) fn json(&self) -> String {
        let rows: Vec<WithRatios<'_>> = self.rows.iter().map(Into::into).collect();
        let value = serde_json::json!({
            "boot": self.boot.as_ref().map(WithRatios::from),
            "rows": rows,
            "held_kib": self.held,
            "parallel": self.parallel,
            "sleep": self.slept,
            "network": self.net,
            "disk": self.disk,
            "geometric_mean": {
                "tcg_by_strata": self.mean(Row::tcg_by_strata),
                "strata_by_native": self.mean(Row::strata_by_native),
            },
        });
        format!("{value:#}")
    }

    /// Geometric mean of a ratio over the rows that have it; `None` where none has.
    fn mean(&self, ratio: impl Fn(&Row) -> Option<f64>) -> Option<f64> {
        let logarithms: Vec<f64> = self.rows.iter().filter_map(ratio).map(f64::ln).collect();
        #[expect(clippy::cast_precision_loss, reason = "a handful of rows")]
        let count = logarithms.len() as f64;
        (count > 0.0).then(|| (logarithms.iter().sum::<f64>() / count).exp())
    }
}

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |cells: [&str; 6]| {
            let [name, numbers @ ..] = cells;
            write!(f, "{name:<16}")?;
            for number in numbers {
                write!(f, "{number:>15}")?;
            }
            writeln!(f)
        };
        if self.boot.is_some() || !self.rows.is_empty() {
            line([
                "",
                "native s",
                "Strata s",
                "TCG s",
                "TCG/Strata",
                "Strata/native",
            ])?;
        }
        for row in self.boot.iter().chain(&self.rows) {
            line([
                &row.name,
                &cell(row.native, 4),
                &cell(row.strata, 4),
                &cell(row.tcg, 4),
                &cell(row.tcg_by_strata(), 2),
                &cell(row.strata_by_native(), 2),
            ])?;
        }
        if !self.rows.is_empty() {
            line([
                "geometric mean",
                "",
                "",
                "",
                &cell(self.mean(Row::tcg_by_strata), 2),
                &cell(self.mean(Row::strata_by_native), 2),
            ])?;
        }
        if let Some([one, two]) = &self.parallel {
            let times = |side: fn(&Row) -> Option<f64>| Some(side(one)? / side(two)?);
            writeln!(
                f,
                "two CPUs, a parallel load: {} s to {} s, {} times faster; the host itself {} times",
                cell(one.strata, 2),
                cell(two.strata, 2),
                cell(times(|row| row.strata), 2),
                cell(times(|row| row.native), 2),
            )?;
        }
        if let Some(Slept { seconds, busy }) = self.slept {
            let share = 100.0 * busy / seconds;
            writeln!(
                f,
                "a sleep of {SLEEP} s took {seconds:.3} s, and {share:.1} % of a core"
            )?;
        }
        if let Some(held) = self.held {
            writeln!(f, "host memory beyond the guest's after a boot: {held} KiB")?;
        }
        if let Some(net) = self.net {
            write!(f, "{net}")?;
        }
        if let Some(disk) = &self.disk {
            write!(f, "{disk}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(native: f64, strata: f64, tcg: f64) -> Row {
        Row {
            name: "r".into(),
            native: Some(native),
            strata: Some(strata),
            tcg: Some(tcg),
        }
    }

    #[test]
    fn ratios_are_averaged_geometrically() {
        let report = Report {
            rows: vec![row(1.0, 2.0, 4.0), row(1.0, 1.0, 8.0)],
            ..Report::default()
        };
        let mean = report.mean(Row::tcg_by_strata).unwrap();
        assert!((mean - 4.0).abs() < 1e-12);
        assert!(report.json().contains("tcg_by_strata"));
    }

    #[test]
    fn a_side_that_was_left_out_is_a_dash() {
        let mut only = row(1.0, 2.0, 4.0);
        only.strata = None;
        let report = Report {
            rows: vec![only],
            ..Report::default()
        };
        let text = report.to_string();
        assert!(text.contains('-') && !text.contains("NaN"), "{text}");
    }
}
