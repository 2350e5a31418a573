//! The JSON of a report is what its schema says, by a validator of JSON Schema.

#[path = "../../tests/common/counted.rs"]
mod counted;
#[path = "../../tests/common/two_passes.rs"]
mod two_passes;

use candle_ode::memory::{MemoryReport, SCHEMA};
use jsonschema::Validator;
use serde_json::{Value, json};
use two_passes::report;

fn json_of(report: &MemoryReport) -> Value {
    serde_json::from_str(&report.json()).unwrap()
}

/// What is wrong, with its place.
fn complaints(schema: &Validator, value: &Value) -> Vec<String> {
    schema.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

#[test]
fn json_is_what_its_schema_says() {
    let schema: Value = serde_json::from_str(MemoryReport::JSON_SCHEMA).unwrap();
    assert_eq!(schema["$id"], SCHEMA);
    jsonschema::meta::validate(&schema).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    for limit in [0, 8, 100] {
        assert_eq!(complaints(&schema, &json_of(&report(limit))), [""; 0]);
    }
    // Whatever is in the file is in the schema, and needed.
    let whole = json_of(&report(100));
    for (name, value) in whole.as_object().unwrap() {
        let mut without = whole.clone();
        without.as_object_mut().unwrap().remove(name);
        assert!(!complaints(&schema, &without).is_empty(), "{name} is not needed");
        let mut other = whole.clone();
        other[name] = if value.is_string() { json!(1) } else { json!("text") };
        assert!(!complaints(&schema, &other).is_empty(), "{name} may be anything");
    }
    let mut more = whole.clone();
    more["hats"] = json!(3);
    let [complaint] = <[String; 1]>::try_from(complaints(&schema, &more)).unwrap();
    assert!(complaint.contains("'hats' was unexpected"), "{complaint}");
}
