// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "EdgeSD",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "EdgeSD", targets: ["EdgeSD"])],
    targets: [
        .target(name: "EdgeSD", resources: [.copy("policies")]),
        .testTarget(name: "EdgeSDTests", dependencies: ["EdgeSD"], exclude: ["recorded"]),
    ]
)
