//! Findings in the Open Cybersecurity Schema Framework 1.4: class 2004, Detection Finding.

use serde_json::{Value, json};

use super::{Finding, State, finding::Severity};

/// A finding as an OCSF object.
#[must_use]
pub fn detection_finding(f: &Finding) -> Value {
    let activity = match f.state {
        State::Open if f.count <= 1 => 1,
        State::Open => 2,
        State::Resolved => 3,
    };
    let severity = match f.severity {
        Severity::Low => 2,
        Severity::Medium => 3,
        Severity::High => 4,
        Severity::Critical => 5,
    };
    // 1 new, 3 suppressed, 4 resolved.
    let status = match f.state {
        State::Resolved => 4,
        State::Open if f.acknowledged => 3,
        State::Open => 1,
    };
    let ms = |ns: u64| ns / 1_000_000;
    let attacks: Vec<Value> = f.attack.iter().map(|t| json!({ "technique": { "uid": t }, "version": "16" })).collect();
    json!({
        "class_uid": 2004,
        "class_name": "Detection Finding",
        "category_uid": 2,
        "category_name": "Findings",
        "activity_id": activity,
        "type_uid": 200_400 + activity,
        "severity_id": severity,
        "status_id": status,
        "time": ms(f.last_seen),
        "count": f.count,
        "message": f.explanation,
        "confidence_score": (f.confidence * 100.0).round() as i64,
        "metadata": {
            "version": "1.4.0",
            "product": { "name": "apiscope", "vendor_name": "apiscope", "version": env!("CARGO_PKG_VERSION") },
            "labels": f.owasp,
        },
        "finding_info": {
            "uid": f.id,
            "title": f.title,
            "desc": f.explanation,
            "first_seen_time": ms(f.first_seen),
            "last_seen_time": ms(f.last_seen),
            "created_time": ms(f.first_seen),
            "types": ["API"],
            "analytic": { "uid": f.rule, "name": f.name, "type_id": 3, "type": "Statistical" },
            "attacks": attacks,
        },
        "resources": [{ "type": "API endpoint", "name": format!("{} {}", f.method, f.route), "namespace": f.service }],
        "evidences": [{
            "actor": { "user": { "uid": f.principal } },
            "src_endpoint": { "ip": f.source },
            "data": { "observed": f.observed, "expected": f.expected, "unit": f.unit, "records_exposed": f.records_exposed, "numbers": f.evidence },
        }],
    })
}
