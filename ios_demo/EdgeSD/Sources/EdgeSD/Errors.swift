/// The errors edgesd raises on purpose: each says what came, what is allowed and what to do (edgesd/errors.py).
public struct EdgesdError: Error, CustomStringConvertible, Sendable {
    public enum Kind: Sendable {
        /// The request cannot be met as written.
        case request
        /// A file or bundle is broken, truncated, hostile or too new.
        case data
        /// This device lacks something: memory, disk space, a chip.
        case setup
    }

    public let kind: Kind
    public let came, allowed, fix: String

    public init(_ kind: Kind, _ came: String, _ allowed: String, _ fix: String) {
        (self.kind, self.came, self.allowed, self.fix) = (kind, came, allowed, fix)
    }

    public var description: String { "\(came). Allowed: \(allowed). \(fix)." }
}

func requestError(_ came: String, _ allowed: String, _ fix: String) -> EdgesdError {
    EdgesdError(.request, came, allowed, fix)
}

func dataError(_ came: String, _ allowed: String, _ fix: String) -> EdgesdError {
    EdgesdError(.data, came, allowed, fix)
}

/// Foreign text as it may stand in a message: short, and nothing in it that steers a screen.
func shown(_ text: String, limit: Int = 160) -> String {
    var out = String.UnicodeScalarView()
    for scalar in text.unicodeScalars.prefix(limit) {
        switch scalar.properties.generalCategory {
        case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator, .paragraphSeparator:
            out.append("?")
        default:
            out.append(scalar)
        }
    }
    return String(out)
}

/// A number without a needless fraction: 20, 0.5.
func plain(_ number: Double) -> String {
    number == number.rounded() && abs(number) < 1e15 ? String(Int(number)) : String(number)
}
