use super::*;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_certificate_is_warned_of_before_it_expires() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::at(&folder.path().join("pki"));
    authority.init(3650).unwrap();
    for (days, early) in [(825, 30), (30, 9)] {
        let issued = authority.issue("hosta", days, folder.path(), true).unwrap();
        let shown = show(&issued.certificate).unwrap();
        let before_end = |days: i64| shown.concern(shown.not_after - days * 86_400);
        assert_eq!(before_end(early + 2), None);
        assert_eq!(before_end(early - 1), Some(Concern::Expires(early - 1)));
        assert_eq!(before_end(0), Some(Concern::Expires(0)));
        assert!(matches!(before_end(-1), Some(Concern::Invalid(why)) if why.contains("expired")));
        let early = shown.concern(shown.not_before - 1);
        assert!(matches!(early, Some(Concern::Invalid(why)) if why.contains("clock")));
    }
}

#[test]
fn an_authority_makes_certificates_for_hosts() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::at(&folder.path().join("pki"));
    let said = authority
        .issue("hosta", 30, folder.path(), false)
        .unwrap_err();
    assert!(said.to_string().contains("transhume pki init"), "{said}");
    let own = authority.init(3650).unwrap();
    let shown = show(&own.certificate).unwrap();
    assert!(shown.authority && shown.valid, "{shown:?}");
    let issued = authority.issue("hosta", 30, folder.path(), false).unwrap();
    let key = std::fs::read(&issued.key).unwrap();
    let again = authority.issue("hosta", 30, folder.path(), false);
    assert!(matches!(again, Err(Error::Issued { .. })));
    assert_eq!(std::fs::read(&issued.key).unwrap(), key);
    let issued = authority.issue("hosta", 30, folder.path(), true).unwrap();
    assert_ne!(std::fs::read(&issued.key).unwrap(), key);
    let shown = show(&issued.certificate).unwrap();
    assert_eq!(shown.hosts, ["hosta"]);
    assert_eq!(shown.issuer, "CN=Transhume authority");
    assert!(!shown.authority && shown.valid, "{shown:?}");
    assert!(shown.not_after - shown.not_before < 31 * 86_400);
    for key in [own.key, issued.key] {
        let mode = std::fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let said = show(&key).unwrap_err().to_string();
        assert!(said.contains("it is a PRIVATE KEY"), "{said}");
    }
    assert!(matches!(authority.init(1), Err(Error::Exists { .. })));
    assert_eq!(
        show(&own.certificate).unwrap().subject,
        "CN=Transhume authority"
    );
}
