/// Safetensors files: an 8-byte length, a JSON header, the tensors end to end. Read as hostile input, written plainly.
public struct Safetensors: Sendable {
    public var tensors: [String: AnyArray]
    public var metadata: [String: String]

    /// What is wrong with a file; the caller says of which.
    struct Malformed: Error { let reason: String }

    public init(_ tensors: [String: AnyArray], metadata: [String: String] = [:]) {
        (self.tensors, self.metadata) = (tensors, metadata)
    }

    /// Throws Malformed or Json.Malformed. F32, I32, I64 and U8 are the types edgesd writes.
    init(parsing data: [UInt8]) throws {
        guard data.count >= 8 else { throw Malformed(reason: "no header") }
        let length = data.withUnsafeBytes { UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self)) }
        guard length <= 100_000_000, length <= UInt64(data.count - 8) else { throw Malformed(reason: "a header too long") }
        let body = 8 + Int(length)
        guard let head = try Json.parse(Array(data[8..<body])).object else { throw Malformed(reason: "no header") }
        (tensors, metadata) = ([:], [:])
        var spans: [Range<Int>] = []
        for (name, entry) in head.fields {
            if name == "__metadata__" {
                for (key, value) in entry.object?.fields ?? [] {
                    guard let text = value.text else { throw Malformed(reason: "metadata that are no text") }
                    metadata[key] = text
                }
                continue
            }
            guard let kind = entry["dtype"]?.text, let shape = entry["shape"]?.list?.map(\.whole),
                let offsets = entry["data_offsets"]?.list?.compactMap(\.whole), offsets.count == 2,
                offsets[0] >= 0, offsets[0] <= offsets[1], offsets[1] <= data.count - body
            else { throw Malformed(reason: "tensor '\(shown(name, limit: 40))' lies outside of the file") }
            var count = 1
            for dim in shape {
                guard let dim, dim >= 0, !count.multipliedReportingOverflow(by: dim).overflow else {
                    throw Malformed(reason: "a shape that is none")
                }
                count *= dim
            }
            let bytes = data[body + offsets[0]..<body + offsets[1]]
            spans.append(offsets[0]..<offsets[1])
            tensors[name] = try Safetensors.array(kind, shape.map { $0! }, count, bytes)
        }
        var end = 0
        for span in spans.sorted(by: { ($0.lowerBound, $0.upperBound) < ($1.lowerBound, $1.upperBound) }) {
            guard span.lowerBound == end else { throw Malformed(reason: "tensors that overlap or leave a hole") }
            end = span.upperBound
        }
        guard end == data.count - body else { throw Malformed(reason: "bytes behind the last tensor") }
    }

    private static func array(_ kind: String, _ shape: [Int], _ count: Int, _ bytes: ArraySlice<UInt8>) throws -> AnyArray {
        guard let size = ["F32": 4, "I32": 4, "I64": 8, "U8": 1][kind] else {
            throw Malformed(reason: "tensors of type \(shown(kind, limit: 8))")
        }
        guard bytes.count / size == count, bytes.count % size == 0 else {
            throw Malformed(reason: "a tensor whose size is not its shape's")
        }
        // Little-endian, as is every Apple and x86 processor.
        func values<T>(_ type: T.Type) -> [T] {
            bytes.withUnsafeBytes { raw in
                (0..<count).map { raw.loadUnaligned(fromByteOffset: $0 * size, as: type) }
            }
        }
        switch kind {
        case "F32": return .f32(NDArray(shape, values(Float.self)))
        case "I32": return .i32(NDArray(shape, values(Int32.self)))
        case "I64": return .i64(NDArray(shape, values(Int64.self)))
        default: return .u8(NDArray(shape, values(UInt8.self)))
        }
    }

    /// The bytes of the file, tensors by name.
    public func dumped() -> [UInt8] {
        var head = JsonObject(), body: [UInt8] = []
        if !metadata.isEmpty {
            _ = head.insert("__metadata__", .object(JsonObject(metadata.sorted { $0.key < $1.key }.map { ($0.key, .string($0.value)) })))
        }
        for (name, array) in tensors.sorted(by: { $0.key < $1.key }) {
            let first = body.count, kind: String
            switch array {
            case .f32(let x): (kind, _) = ("F32", x.values.withUnsafeBytes { body += $0 })
            case .i32(let x): (kind, _) = ("I32", x.values.withUnsafeBytes { body += $0 })
            case .i64(let x): (kind, _) = ("I64", x.values.withUnsafeBytes { body += $0 })
            case .u8(let x): (kind, _) = ("U8", x.values.withUnsafeBytes { body += $0 })
            }
            let entry: [(String, Json)] = [
                ("dtype", .string(kind)), ("shape", .array(array.shape.map(Json.int))),
                ("data_offsets", .array([.int(first), .int(body.count)])),
            ]
            _ = head.insert(name, .object(JsonObject(entry)))
        }
        var text = Array(Json.object(head).dumped.utf8)
        text += [UInt8](repeating: 0x20, count: (8 - text.count % 8) % 8)
        let length: [UInt8] = withUnsafeBytes(of: UInt64(text.count).littleEndian) { Array($0) }
        return length + text + body
    }
}
