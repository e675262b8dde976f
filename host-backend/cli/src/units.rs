//! Numbers as people read them.

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// A number of bytes in three digits or so.
pub(crate) fn bytes(number: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = to_float(number);
    while scaled >= 1000.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let digits = match scaled {
        _ if unit == 0 => 0,
        scaled if scaled < 10.0 => 2,
        scaled if scaled < 100.0 => 1,
        _ => 0,
    };
    format!("{scaled:.digits$} {}", units[unit])
}

#[expect(clippy::cast_precision_loss, reason = "for showing")]
pub(crate) fn to_float(number: u64) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "for showing; it saturates"
)]
pub(crate) fn to_number(float: f64) -> u64 {
    float as u64
}

/// Milliseconds in a unit that fits.
pub(crate) fn duration(ms: f64) -> String {
    let seconds = ms / 1000.0;
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        _ if seconds < 60.0 => format!("{seconds:.2} s"),
        _ => {
            let whole = to_number(seconds);
            format!("{} min {:02} s", whole / 60, whole % 60)
        }
    }
}

/// A moment in milliseconds since 1970, in UTC: `2026-11-30 04:20:54 UTC`.
pub(crate) fn date(ms: u64) -> String {
    let (days, seconds) = (ms / 86_400_000, ms / 1000 % 86_400);
    // Days to a date: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}
