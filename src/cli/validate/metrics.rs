//! What `/metrics` says: the text format of Prometheus, taken apart as far as it has to be judged. Pure.

use std::collections::BTreeMap;

use uuid::Uuid;

/// A family: what its help and type lines say, and its samples.
#[derive(Debug, Default, PartialEq)]
pub struct Family {
    pub kind: String,
    pub help: bool,
    pub samples: Vec<Sample>,
}

#[derive(Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Families by name.
///
/// # Errors
/// A line that cannot be understood.
pub fn parse(text: &str) -> Result<BTreeMap<String, Family>, String> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let wrong = || format!("not understood: {line}");
        if let Some(comment) = line.strip_prefix('#') {
            let mut words = comment.split_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some("TYPE"), Some(name), Some(kind)) => {
                    families.entry(name.to_owned()).or_default().kind = kind.to_owned()
                }
                (Some("HELP"), Some(name), Some(_)) => families.entry(name.to_owned()).or_default().help = true,
                _ => {}
            }
            continue;
        }
        let sample = sample(line).ok_or_else(wrong)?;
        let family =
            family_of(&families, &sample.name).ok_or_else(|| format!("no type is told for {}", sample.name))?;
        families.entry(family).or_default().samples.push(sample);
    }
    Ok(families)
}

/// A histogram's samples have longer names.
fn family_of(families: &BTreeMap<String, Family>, sample: &str) -> Option<String> {
    let longer = ["_bucket", "_sum", "_count"].into_iter();
    let names = longer.filter_map(|end| sample.strip_suffix(end)).chain([sample]);
    names
        .filter(|name| families.get(*name).is_some_and(|family| !family.kind.is_empty()))
        .map(str::to_owned)
        .next()
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(|c: char| c == '{' || c.is_whitespace())?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(label.to_owned(), value);
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// Up to the quote that ends it, and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

/// What is wrong with a family, if anything is: its type, its name, its values or its labels.
pub fn fault(name: &str, family: &Family) -> Option<String> {
    let ours = name.starts_with("diptych_");
    if !ours && !name.starts_with("process_") {
        return Some(format!(
            "{name}: the name begins neither with diptych_ nor with process_"
        ));
    }
    if !family.help {
        return Some(format!("{name}: no help text"));
    }
    let counts = match family.kind.as_str() {
        "counter" => true,
        "gauge" => false,
        "histogram" => {
            let buckets = family
                .samples
                .iter()
                .any(|sample| sample.labels.get("le").is_some_and(|le| le == "+Inf"));
            if !buckets && !family.samples.is_empty() {
                return Some(format!("{name}: a histogram without its last bucket"));
            }
            true
        }
        other => return Some(format!("{name}: the type is {other}")),
    };
    if family.kind == "counter" && !name.ends_with("_total") {
        return Some(format!("{name}: a counter's name ends with _total"));
    }
    for sample in &family.samples {
        if !sample.value.is_finite() || (counts && sample.value < 0.0) {
            return Some(format!("{}: the value is {}", sample.name, sample.value));
        }
        let named = sample.labels.values().find(|value| Uuid::parse_str(value).is_ok());
        if let Some(id) = named {
            return Some(format!(
                "{}: the id {id} as a label: one series for each collection",
                sample.name
            ));
        }
    }
    None
}

/// The value of a gauge, for a node.
pub fn of_node(families: &BTreeMap<String, Family>, name: &str, node: &str) -> Option<f64> {
    let samples = &families.get(name)?.samples;
    let found = samples
        .iter()
        .find(|sample| sample.labels.get("node").is_some_and(|label| label == node));
    Some(found?.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# HELP diptych_node_up 1: it is given requests.
# TYPE diptych_node_up gauge
diptych_node_up{node="primary"} 1
diptych_node_up{node="a \"b\"}, c",x="y"} 0
# HELP diptych_requests_total Requests.
# TYPE diptych_requests_total counter
diptych_requests_total 1.5e3
# HELP diptych_time_seconds Times.
# TYPE diptych_time_seconds histogram
diptych_time_seconds_bucket{le="+Inf"} 3
diptych_time_seconds_sum 0.25
diptych_time_seconds_count 3
"#;

    #[test]
    fn the_text_is_taken_apart() {
        let families = parse(TEXT).expect("metrics");
        assert_eq!(of_node(&families, "diptych_node_up", "primary"), Some(1.0));
        assert_eq!(of_node(&families, "diptych_node_up", "a \"b\"}, c"), Some(0.0));
        assert_eq!(of_node(&families, "diptych_node_up", "other"), None);
        assert_eq!(families["diptych_requests_total"].samples[0].value, 1500.0);
        assert_eq!(families["diptych_time_seconds"].samples.len(), 3);
        for (name, family) in &families {
            assert_eq!(fault(name, family), None);
        }
        assert!(parse("x").is_err() && parse("x 1").is_err() && parse("x{a=\"b} 1").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_family_is_told() {
        let of = |text: &str, part: &str| {
            let families = parse(text).expect("metrics");
            let (name, family) = families.iter().next().expect("a family");
            let found = fault(name, family).expect("a fault");
            assert!(found.contains(part), "{found}");
        };
        of("# TYPE x_total counter", "neither with");
        of("# TYPE diptych_x gauge\ndiptych_x 1", "no help");
        of("# HELP diptych_x X.\n# TYPE diptych_x counter\ndiptych_x 1", "_total");
        of("# HELP diptych_x X.\n# TYPE diptych_x summary\ndiptych_x 1", "summary");
        of("# HELP diptych_x X.\n# TYPE diptych_x gauge\ndiptych_x NaN", "NaN");
        of(
            "# HELP diptych_x_total X.\n# TYPE diptych_x_total counter\ndiptych_x_total -1",
            "-1",
        );
        of(
            "# HELP diptych_x X.\n# TYPE diptych_x gauge\ndiptych_x{id=\"00000000-0000-0000-0000-000000000001\"} 1",
            "as a label",
        );
        of(
            "# HELP diptych_x X.\n# TYPE diptych_x histogram\ndiptych_x_sum 1",
            "last bucket",
        );
    }
}
