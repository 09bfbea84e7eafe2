//! "Did you mean": the nearest name that exists, when it is near enough to be meant.

/// `"; did you mean `x`?"`, or where nothing is near, all names if they are few, else nothing.
pub(super) fn did_you_mean(written: &str, names: &[&str]) -> String {
    const FEW: usize = 12;
    let lower = written.to_ascii_lowercase().replace('-', "_");
    match nearest(&lower, names) {
        Some(name) => format!("; did you mean `{name}`?"),
        _ if names.is_empty() || names.len() > FEW => String::new(),
        _ => format!("; known here: `{}`", names.join("`, `")),
    }
}

/// The nearest name, if it is near enough to be meant.
pub fn nearest<'a>(written: &str, names: &[&'a str]) -> Option<&'a str> {
    let nearest = names.iter().map(|name| (distance(written, name), *name)).min();
    nearest
        .filter(|(distance, name)| *distance <= 1.max(name.len().min(written.len()) / 3))
        .map(|(_, name)| name)
}

/// Edits between two names, a swap of neighbours counted as one (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted() {
        for (a, b, edits) in [
            ("", "", 0),
            ("", "ab", 2),
            ("reads", "reads", 0),
            ("raeds", "reads", 1),
            ("red", "reads", 2),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }

    #[test]
    fn only_the_near_is_suggested() {
        let names = ["interval", "timeout", "unhealthy_after", "healthy_after"];
        assert_eq!(did_you_mean("intervall", &names), "; did you mean `interval`?");
        assert_eq!(did_you_mean("healthyAfter", &names), "; did you mean `healthy_after`?");
        assert_eq!(
            did_you_mean("unhealthy-after", &names),
            "; did you mean `unhealthy_after`?"
        );
        assert_eq!(did_you_mean("tls", &["address"]), "; known here: `address`");
        assert_eq!(did_you_mean("x", &[]), "");
    }
}
