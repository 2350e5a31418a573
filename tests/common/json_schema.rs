//! JSON Schema (draft 2020-12), as much of it as our schema uses. A keyword that is not known here is a failure.

use serde_json::Value;

/// What is wrong with `value`, with the place of each.
pub(crate) fn complaints(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, schema, value, "", &mut found);
    found
}

fn check(root: &Value, schema: &Value, value: &Value, place: &str, found: &mut Vec<String>) {
    let mut wrong = Vec::new();
    let mut must = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{place} {what}"));
        }
    };
    let list = |value: &Value| value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    let mut inner = Vec::new();
    for (keyword, says) in schema.as_object().unwrap() {
        match keyword.as_str() {
            "$schema" | "$id" | "$defs" | "title" | "description" => {}
            "$ref" => {
                let target = says.as_str().unwrap().strip_prefix('#').unwrap();
                inner.push((root.pointer(target).unwrap(), value, place.to_owned()));
            }
            "type" => must(list(says).iter().any(|name| is(value, name.as_str().unwrap())), &format!("is no {says}")),
            "const" => must(value == says, &format!("is not {says}")),
            "enum" => must(list(says).contains(value), &format!("is none of {says}")),
            "minimum" => must(value.as_f64().is_none_or(|number| number >= says.as_f64().unwrap()), "is too small"),
            "required" => {
                for name in list(says) {
                    let name = name.as_str().unwrap();
                    must(!value.is_object() || value.get(name).is_some(), &format!("lacks {name}"));
                }
            }
            "properties" => {
                let properties = says.as_object().unwrap().iter();
                inner.extend(
                    properties.filter_map(|(name, says)| Some((says, value.get(name)?, format!("{place}/{name}")))),
                );
            }
            "additionalProperties" => {
                let known = |name: &str| schema.get("properties").and_then(|known| known.get(name)).is_some();
                for (name, value) in value.as_object().into_iter().flatten().filter(|(name, _)| !known(name)) {
                    match says {
                        Value::Bool(allowed) if !allowed => inner.push((says, value, format!("{place}/{name}"))),
                        Value::Bool(_) => {}
                        schema => inner.push((schema, value, format!("{place}/{name}"))),
                    }
                }
            }
            "propertyNames" => {
                for name in value.as_object().into_iter().flatten().map(|(name, _)| Value::from(name.as_str())) {
                    check(root, says, &name, &format!("{place}/{name}"), found);
                }
            }
            "minItems" | "maxItems" => {
                let (count, bound) = (value.as_array().map_or(0, Vec::len) as u64, says.as_u64().unwrap());
                must(if keyword == "minItems" { count >= bound } else { count <= bound }, "has another length");
            }
            "items" => {
                let items = value.as_array().into_iter().flatten().enumerate();
                inner.extend(items.map(|(n, value)| (says, value, format!("{place}/{n}"))));
            }
            unknown => panic!("`{unknown}` is a keyword that this checker does not know"),
        }
    }
    found.extend(wrong);
    for (schema, value, place) in inner {
        match schema {
            Value::Bool(_) => found.push(format!("{place} is not in the schema")),
            schema => check(root, schema, value, &place, found),
        }
    }
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        other => panic!("`{other}` is no type"),
    }
}
